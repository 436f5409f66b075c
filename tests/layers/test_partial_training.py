"""--unfreeze: what is trained, and that it is trained as if the other parameters' gradients were masked."""

import re

import pytest
import torch
import torchvision
from torch import nn

from modules.config import Config
from modules.layers.low_rank import merge_adapters
from modules.layers.partial_training import Trunk, resting
from modules.layers.visual_extractor import VisualExtractor
from modules.runtime.errors import InputError
from tests.layers.test_hub_encoders import MODELS, load, save

torch.set_num_threads(1)


def trained(extractor):
    return {key.removeprefix("model.") for key, value in extractor.named_parameters() if value.requires_grad}


@pytest.mark.parametrize(
    ("name", "size", "part", "first"),
    [
        ("resnet18", 64, "last:1", ("7.",)),
        ("resnet18", 64, "last:2", ("6.", "7.")),
        (
            "vit_b_32",
            32,
            "last:2",
            ("vit.encoder.layers.encoder_layer_10.", "vit.encoder.layers.encoder_layer_11.", "vit.encoder.ln."),
        ),
        ("vit_tiny_patch16_224", 32, "last:1", ("model.blocks.11.", "model.norm.")),
        ("swin_tiny_patch4_window7_224", 64, "last:1", ("model.layers.3.", "model.norm.")),
    ],
)
def test_the_last_stages_and_what_follows_them(name, size, part, first):
    with torch.device("meta"):
        extractor = VisualExtractor(name, image_size=size, unfreeze=part)
    every = {key.removeprefix("model.") for key, _ in extractor.named_parameters()}
    assert trained(extractor) == {key for key in every if key.startswith(first)} != set()


@pytest.mark.parametrize("kind", MODELS)
def test_the_last_block_of_a_small_model_of_transformers(tmp_path, kind):
    """Where embeddings are as large as all blocks, and where there is only one block."""
    save(tmp_path, kind)
    for number in (1, 2):
        extractor = load(tmp_path, unfreeze=f"last:{number}")
        blocks = {re.search(r"(?:layers?|stages)\.\d+", key) for key in trained(extractor)} - {None}
        assert len({found[0] for found in blocks}) == number
        with torch.no_grad():
            images = torch.randn(3, 1, 3, 32, 32)
            patches, _, _ = extractor(images)
            stored, _, _ = extractor.cut()(images)
            torch.testing.assert_close(extractor(stored.unsqueeze(1))[0], patches, rtol=1e-5, atol=1e-5)
    if kind == "vit":
        save(tmp_path, kind, num_hidden_layers=1)
        assert {key.split(".")[1] for key in trained(load(tmp_path, unfreeze="last:1"))} == {"layers", "layernorm"}


def test_norms_and_biases():
    norms, biases = (trained(VisualExtractor("resnet18", unfreeze=part)) for part in ("norm", "bias"))
    assert (
        "1.weight" in norms and "4.0.bn1.bias" in norms and "0.weight" not in norms and "4.0.conv1.weight" not in norms
    )
    assert biases == {key for key in norms if key.endswith("bias")}


@pytest.mark.parametrize(
    ("name", "part", "stored"),
    [
        ("resnet18", "last:1", False),
        ("resnet18", "norm", False),
        ("resnet18", "bias", False),
        ("resnet18", "last:2", True),
        ("tf_efficientnet_lite0", "last:1", True),
        ("swin_tiny_patch4_window7_224", "last:1", True),
    ],
)
def test_steps_are_those_of_full_training_with_masked_gradients(name, part, stored):
    torch.manual_seed(0)
    own, full = VisualExtractor(name, image_size=64, unfreeze=part), VisualExtractor(name, image_size=64)
    full.load_state_dict(own.state_dict())
    own.train()
    full.train()
    trunk = own.cut() if stored else None
    assert own.model.training and not any(part.training for part in resting(own.model))
    for module, twin in zip(own.modules(), full.modules(), strict=True):
        twin.training = module.training  # what is frozen computes as in evaluation
    chosen = trained(own)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in (own, full)]
    for _ in range(2):
        images = torch.randn(2, 1, 3, 64, 64)
        given = images if trunk is None else trunk(images)[0].unsqueeze(1)
        for model, seen, optimizer in zip((own, full), (given, images), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(1)  # of stochastic depth
            model(seen)[0].square().mean().backward()
            for key, value in model.named_parameters():
                value.grad = value.grad if key.removeprefix("model.") in chosen else None
            optimizer.step()
    for key, value in full.state_dict().items():
        assert torch.equal(own.state_dict()[key], value), key


def test_frozen_statistics_stay_and_trained_ones_move():
    extractor = VisualExtractor("resnet18", unfreeze="last:1").train()
    assert isinstance(extractor.model[1], nn.BatchNorm2d)
    extractor(torch.randn(2, 1, 3, 64, 64))
    assert extractor.model[1].num_batches_tracked == 0 and extractor.model[7][0].bn1.num_batches_tracked == 1


@pytest.mark.parametrize("stored", [False, True])
def test_a_trained_stage_has_its_stochastic_depth_and_a_frozen_one_none(stored):
    extractor = VisualExtractor("swin_tiny_patch4_window7_224", image_size=64, unfreeze="last:1").train()
    if stored:
        extractor.cut()
    depths = {key: part for key, part in extractor.model.named_modules() if type(part).__name__ == "DropPath"}
    assert {key: part.training for key, part in depths.items()} == {key: "layers.3." in key for key in depths}
    assert any(part.training and part.drop_prob for part in depths.values()) and len(depths) > 4


def test_what_is_stored_depends_on_what_is_frozen_alone():
    torch.manual_seed(0)
    extractor = VisualExtractor("resnet18", image_size=64, unfreeze="last:1")
    trunk, images = extractor.cut(), torch.randn(2, 1, 3, 64, 64)
    before, stored = trunk.state_dict(), trunk(images)[0]
    assert stored.shape == (2, trunk.patches_per_view, trunk.width) == (2, 256, 4 * 4)
    with torch.no_grad():
        for _, value in (*extractor.model[7].named_parameters(), *extractor.model[7].named_buffers()):
            value.add_(1)
    after = trunk.state_dict()
    assert before.keys() == after.keys() and not any(key.startswith("7.") for key in before)
    assert torch.equal(trunk(images)[0], stored)
    assert {f"model.{key}" for key in before} < extractor.state_dict().keys()


def test_views_that_are_absent_are_not_computed_from_what_is_stored():
    extractor = VisualExtractor("resnet18", image_size=64, unfreeze="last:1").eval()
    images, there = torch.randn(2, 2, 3, 64, 64), torch.tensor([[True, True], [True, False]])
    wanted = extractor(images, there)
    trunk = extractor.cut()
    stored = torch.stack([trunk(images[:, view : view + 1])[0] for view in range(2)], dim=1) * there[..., None, None]
    for found, value in zip(extractor(stored, there), wanted, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


class Bypassed(nn.Sequential):
    """A network whose last stage is added to the first one's output."""

    def forward(self, images):
        early = self[0](images)
        return early + self[2](self[1](early))


def test_a_network_that_cannot_be_cut_is_refused():
    model = Bypassed(*(nn.Conv2d(3, 3, 1) for _ in range(3))).eval()
    model[:2].requires_grad_(False)
    with pytest.raises(ValueError, match="bypassed: what is trained cannot be computed from what lies below it"):
        Trunk(model, [model[0], model[1]], "bypassed", torch.randn(2, 3, 4, 4))
    assert "forward" not in vars(model[0])


def test_what_cannot_be_unfrozen_is_refused():
    with pytest.raises(ValueError, match="unfreeze last:9: visual_extractor resnet18 has 6 stages"):
        VisualExtractor("resnet18", unfreeze="last:9")
    for value in ("last", "last:0", "head"):
        with pytest.raises(InputError, match=f"--unfreeze {value}: must be last:N"):
            Config(unfreeze=value)
    with pytest.raises(InputError, match="--unfreeze last:1: --freeze_visual_extractor true trains no part"):
        Config(unfreeze="last:1", freeze_visual_extractor=True)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vit_tiny_patch16_224", {"attn.qkv", "attn.proj"}),
        # Its queries, keys and values are read without calling their layer.
        ("beit_base_patch16_224", {"attn.proj"}),
    ],
)
def test_adapters_are_on_the_attention(name, layers):
    with torch.device("meta"):
        extractor = VisualExtractor(name, image_size=32, unfreeze="lora:2")
    assert all("lora_" in key for key in trained(extractor))
    assert {key.partition(".lora_")[0].partition("blocks.0.")[2] for key in trained(extractor)} - {""} == layers


def test_adapters_can_be_merged():
    torch.manual_seed(0)
    extractor = VisualExtractor("vit_tiny_patch16_224", image_size=32, unfreeze="lora:2").eval()
    images = torch.randn(1, 1, 3, 32, 32)
    with torch.no_grad():
        for key, value in extractor.named_parameters():
            value.copy_(torch.randn_like(value) if "lora_B" in key else value)
        before = extractor(images)[0]
        merge_adapters(extractor)
        torch.testing.assert_close(extractor(images)[0], before, rtol=1e-4, atol=1e-4)
    with torch.device("meta"):
        plain = VisualExtractor("vit_tiny_patch16_224", image_size=32)
    assert extractor.state_dict().keys() == plain.state_dict().keys()


def test_what_has_no_attention_has_no_adapters():
    with pytest.raises(ValueError, match="unfreeze lora:2: visual_extractor resnet18 has no attention"):
        VisualExtractor("resnet18", unfreeze="lora:2")


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_layers_that_were_replaced_rest_too(name):
    """--sync_bn true replaces every normalisation after the extractor is built."""
    own = VisualExtractor(name, image_size=64, pretrained=False, unfreeze="last:1")
    nn.SyncBatchNorm.convert_sync_batchnorm(own).train()
    norms = [module for module in own.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert norms and {module.training for module in norms if not module.weight.requires_grad} == {False}
    assert any(module.training for module in norms)


def test_weights_of_a_deeper_model_are_refused(tmp_path):
    deep = VisualExtractor("resnet34", image_size=64, pretrained=False)
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    with pytest.raises(ValueError, match="it is of a deeper model than"):
        VisualExtractor("resnet18", image_size=64, weights=str(tmp_path / "resnet34.pth"))
    VisualExtractor("resnet34", image_size=64, weights=str(tmp_path / "resnet34.pth"))
    assert deep.width == 512
