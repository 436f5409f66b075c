"""ITHN against vectors computed with the released code and with the paper's equations (GOLDEN_DIR/ITHN)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models import owner_of
from models.r2gencmn import R2GenCMN, Settings
from modules.data.batches import Batch, Pair
from modules.ithn.losses import contrastive_loss, cosine_loss, modified_scores, normalise
from modules.ithn.objective import Objective
from modules.ithn.settings import ITHNSettings
from modules.ithn.synthesis import ithn, project, released
from modules.ithn.weights import load_published_state, published_state
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.errors import InputError
from modules.training.optimizers import build_optimizer
from modules.training.settings import OptimSettings
from tests.golden_support import GOLDEN_DIR, Golden, load_visual, read_golden

torch.set_num_threads(1)
OPTIONS = (
    "d_model",
    "d_ff",
    "num_heads",
    "num_layers",
    "dropout",
    "drop_prob_lm",
    "use_bn",
    "topk",
    "cmm_size",
    "cmm_dim",
)
EPOCHS = (0, 1, 10, 50, 100)  # the value in the exponent of the hardness
OURS = Path(__file__).resolve().parents[1] / "golden"
# Float64 evaluations of the paper's equations on the embeddings in tests/golden that the files themselves do not hold.
of_these_vectors = pytest.mark.skipif(not GOLDEN_DIR.samefile(OURS), reason="other vectors")
TRUE_COSINE = {10: 0.8564, 100: 0.9581}
DECOUPLED = {0: 0.201277, 1: 0.206213, 10: 0.248564, 50: 0.397850, 100: 0.518393}
GRADIENT_NORMS = {True: (2.47076, 1.23999, 0.651256, 0.651538), False: (2.46155, 1.23999, 0.731023, 2.730550)}


@pytest.fixture(scope="module")
def golden() -> Golden:
    return read_golden("ITHN", "iu_xray")


@pytest.fixture(scope="module")
def make(golden) -> Callable[..., Objective]:
    """The stored model inside an objective of the wanted kind, in evaluation mode."""

    def build(joint_pass=None, **options) -> Objective:
        extractor = VisualExtractor(golden.options["visual_extractor"])
        load_visual(extractor, golden.config["visual_seed"])
        settings = Settings(**{name: golden.options[name] for name in OPTIONS})
        num_ids = golden.config["vocab_size"] + 1
        backbone = R2GenCMN(visual_extractor=extractor, num_ids=num_ids, settings=settings)
        visual = {name: value for name, value in backbone.state_dict().items() if name.startswith("visual_extractor.")}
        settings = ITHNSettings(embedding_dim=golden.arrays["pos_img_embeds"].shape[1], **options)
        objective = Objective(backbone, settings)
        if joint_pass is not None:
            objective.variant = replace(objective.variant, joint_pass=joint_pass)
        assert load_published_state(objective, golden.state | visual) == []
        return objective.eval()

    return build


@pytest.fixture(scope="module")
def batch(golden) -> Batch:
    def pair(prefix: str) -> Pair:
        images = golden.images(f"{prefix}images_small")
        tokens, mask = golden.arrays[f"{prefix}report_ids"], golden.arrays[f"{prefix}report_masks"].bool()
        return Pair(images, torch.ones(images.shape[:2], dtype=torch.bool), tokens, mask)

    rows = len(golden.arrays["report_ids"])
    return Batch(
        pair(""),
        pair("neg_"),
        torch.ones(rows, dtype=torch.bool),
        torch.arange(rows),
        torch.arange(rows),
        [""] * rows,
        [""] * rows,
    )


def losses_at(golden: Golden, epoch: int) -> dict[str, float]:
    return next(row for row in golden.config["losses"] if row["epoch"] == epoch)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), rtol=tolerance, atol=tolerance
    )


def embeddings(golden: Golden) -> list[torch.Tensor]:
    """z, u, z-, u- in float64, as leaves."""
    names = ("pos_img_embeds", "pos_rep_embeds", "neg_img_embeds", "neg_rep_embeds")
    return [golden.arrays[name].double().requires_grad_() for name in names]


# ---- loss module alone, on the stored embeddings


def test_projections_and_harder_negatives(golden):
    z, u, _, negative_u = embeddings(golden)
    hardness = losses_at(golden, 10)["lambda_paper"]
    close(project(z, u, negative_u), golden.arrays["proj_paper"], 1e-12)
    close(ithn(z, u, negative_u, hardness), golden.arrays["hard_neg_paper"], 1e-12)
    close(released(z, u, negative_u, hardness), golden.arrays["hard_neg_code"], 1e-12)


@pytest.mark.parametrize("epoch", EPOCHS)
def test_similarities_and_losses(golden, epoch):
    z, u, negative_z, negative_u = embeddings(golden)
    expected, scale = losses_at(golden, epoch), torch.tensor(golden.config["temp_1"]).double().exp()
    of_code = released(z, u, negative_u, expected["lambda_paper"])
    of_paper = ithn(z, u, negative_u, expected["lambda_paper"])
    code = modified_scores(z, u, negative_z, negative_u, of_code, scale, scale, keep_off_diagonal=False)
    paper = modified_scores(z, u, negative_z, negative_u, of_paper, scale)
    if epoch == 10:
        close(code, golden.arrays["S_code"], 1e-7)
        close(paper, golden.arrays["S_paper"], 1e-7)
    close(contrastive_loss(code), expected["l_cp_code"], 1e-6)
    close(contrastive_loss(paper), expected["l_cp_paper"], 1e-7)
    close(cosine_loss(z, negative_z), expected["l_cs"], 1e-6)
    close(cosine_loss(z, negative_z), expected["l_cs_paper_abs_cos"], 1e-7)


@of_these_vectors
@pytest.mark.parametrize("epoch", EPOCHS)
def test_decoupled_form_and_true_cosine(golden, epoch):
    z, u, negative_z, negative_u = embeddings(golden)
    scale = torch.tensor(golden.config["temp_1"]).double().exp()
    harder = ithn(z, u, negative_u, losses_at(golden, epoch)["lambda_paper"])
    close(
        contrastive_loss(modified_scores(z, u, negative_z, negative_u, harder, scale), "decoupled"),
        DECOUPLED[epoch],
        1e-6,
    )
    if epoch in TRUE_COSINE:
        cosine = modified_scores(z, u, negative_z, negative_u, normalise(harder), scale)
        close(contrastive_loss(cosine), TRUE_COSINE[epoch], 1e-4)


@of_these_vectors
@pytest.mark.parametrize("detach", [True, False])
def test_gradient_norms_of_the_contrastive_loss(golden, detach):
    z, u, negative_z, negative_u = embeddings(golden)
    t = torch.tensor(golden.config["temp_1"]).double().requires_grad_()
    harder = ithn(z, u, negative_u, losses_at(golden, 10)["lambda_paper"])
    scores = modified_scores(z, u, negative_z, negative_u, harder.detach() if detach else harder, t.exp())
    *gradients, of_t = torch.autograd.grad(contrastive_loss(scores), (z, negative_z, u, negative_u, t))
    close(torch.stack([gradient.norm() for gradient in gradients]), torch.tensor(GRADIENT_NORMS[detach]), 1e-5)
    close(of_t, -0.317480, 1e-5)


# ---- whole objective, from the images


def test_released_objective(golden, make, batch):
    expected = losses_at(golden, 10)
    with torch.no_grad():
        terms = make(ithn_variant="released")(batch, 10)
    close(terms["hardness"], expected["lambda_paper"], 1e-6)
    close(terms["nll"], expected["ce"])
    close(terms["contrastive"], expected["l_cp_code"])
    close(terms["cosine"], expected["l_cs"])
    close(terms["loss"], expected["total_code"])


@pytest.mark.parametrize("joint_pass", [True, False])
def test_embeddings_of_the_whole_network(golden, make, batch, joint_pass):
    """Two calls or one batch: the same embeddings, with the released text feature."""
    objective = make(ithn_variant="released", joint_pass=joint_pass)
    pairs = [batch.positive, batch.negative]
    with torch.no_grad():
        features = objective._features(pairs, objective._passes(pairs))
    for name, feature in zip(("pos_img", "neg_img", "pos_rep", "neg_rep"), features, strict=True):
        close(feature, golden.arrays[f"{name}_embeds"])


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_terms_of_all_epochs(golden, make, batch, variant):
    """The network runs once; the stored paper values use the released text feature, the mean over all positions."""
    objective = make(ithn_variant=variant, renormalise_negative=False)
    pairs = [replace(pair, token_mask=torch.ones_like(pair.token_mask)) for pair in (batch.positive, batch.negative)]
    suffix = {"paper": "paper", "released": "code"}[variant]
    with torch.no_grad():
        features = objective._features(pairs, objective._passes(pairs))
        for epoch in EPOCHS:
            expected = losses_at(golden, epoch)
            terms = objective._contrastive_terms(
                batch, features, objective.hardness(epoch + objective.variant.first_epoch)
            )
            close(terms["hardness"], expected["lambda_paper"], 1e-6)
            close(terms["contrastive"], expected[f"l_cp_{suffix}"])
            close(terms["cosine"], expected["l_cs"])


def test_paper_objective(golden, make, batch):
    """From the images to L_F; L_CP is its own here, because padding is left out of the text feature."""
    with torch.no_grad():
        terms = make()(batch, 11)
    expected = losses_at(golden, 10)
    close(terms["hardness"], expected["lambda_paper"], 1e-6)
    close(terms["nll"], expected["ce"])
    close(terms["cosine"], expected["l_cs_paper_abs_cos"])
    close(terms["loss"], expected["ce"] + 0.1 * terms["contrastive"].double() + 0.2 * expected["l_cs_paper_abs_cos"])


def test_gradient_norms_of_the_released_objective(golden, make, batch):
    objective = make(ithn_variant="released")
    objective(batch, 10)["loss"].backward()
    parameters = dict(objective.named_parameters(remove_duplicate=False))
    for name, expected in golden.config["grad_norms"].items():
        parameter = parameters.get(name, parameters.get(f"backbone.{name}"))
        if expected is None:
            assert parameter.grad is None, name
        else:
            assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-3, abs=1e-6), name


def test_training_history_of_the_released_objective(golden, make, batch):
    objective, options = make(ithn_variant="released"), golden.options
    rates = golden.config["eval_mode_train_lr"]
    optimizer = build_optimizer(
        objective,
        OptimSettings(
            lr_ve=rates["ve"],
            lr_ed=rates["ed"],
            weight_decay=options["weight_decay"],
            adam_betas=tuple(options["adam_betas"]),
            adam_eps=options["adam_eps"],
            amsgrad=options["amsgrad"],
        ),
    )
    history = []
    for _ in golden.config["eval_mode_train_losses"]:
        loss = objective(batch, 10)["loss"]
        history.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        objective.after_step()
    close(torch.tensor(history), torch.tensor(golden.config["eval_mode_train_losses"]), 1e-4)


def test_parameter_order_and_keys_are_the_published_ones(golden, make):
    objective = make(ithn_variant="released")
    names = [name.removeprefix("backbone.") for name, _ in objective.named_parameters()]
    assert names[:3] == ["temp_1", "temp_3", "visual_extractor.model.0.weight"]
    assert names[-2:] == ["img_projection.linear1.weight", "text_projection.linear1.weight"]
    written = published_state(objective)
    assert set(golden.state) | set(golden.config["omitted_keys"]) == {
        name for name in written if not name.startswith("visual_extractor.")
    }
    for name, value in golden.state.items():
        assert torch.equal(written[name], value), name


def test_published_files_load_or_say_why_not(golden, make):
    written = published_state(make(ithn_variant="released"))
    paper = make()  # no temp_3 in the paper's variant
    plain = {name: value for name, value in written.items() if not name.startswith(("temp_", "img_p", "text_p"))}
    heads = {"temp_1", "img_projection.linear1.weight", "text_projection.linear1.weight"}
    assert set(load_published_state(paper, plain)) == heads
    fewer = {name: value for name, value in plain.items() if name != "encoder_decoder.logit.bias"}
    with pytest.raises(InputError, match="1 entries are missing, the first is encoder_decoder.logit.bias"):
        load_published_state(paper, fewer)
    with pytest.raises(InputError, match="the first is encoder_decoder.rm.W"):
        load_published_state(paper, plain | {"encoder_decoder.rm.W": torch.zeros(1)})
    with pytest.raises(InputError, match="weights of r2gen; give --backbone r2gen"):
        load_published_state(paper, plain | {"encoder_decoder.model.rm.W": torch.zeros(1)}, owner_of)
    with pytest.raises(InputError, match=r"entry encoder_decoder.logit.bias: shape \(3,\), but this model has \("):
        load_published_state(paper, plain | {"encoder_decoder.logit.bias": torch.zeros(3)})
