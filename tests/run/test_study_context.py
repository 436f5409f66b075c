"""Context beside the images: read and masked where it is, absent it changes nothing, and it teaches what it holds."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from modules.config import Config
from modules.data.annotations import Study, read_annotation
from modules.data.batches import Context
from modules.data.dataset_specs import parse_contexts
from modules.data.study_context import ContextReader, prior_problem, with_sections
from modules.data.tokenizers import Tokenizer
from modules.flags import parse_flags
from modules.inference.prediction import StudyContext
from modules.labels.rules import CLASSES
from modules.run.described_studies import read_described, study_files
from modules.run.predictor import load_predictor
from modules.run.testing import run_testing
from modules.runtime.errors import InputError
from modules.training.checkpoint import load_checkpoint
from scripts import predict

torch.set_num_threads(1)
WORDS = "effusion edema fracture nodule".split()


def toy(folder, kind, count=64):
    """Images of noise. "indication": the report repeats its word; "prior": "unchanged" after a bright prior image."""
    draw = np.random.default_rng(0)
    rows = {"train": [], "val": [], "test": []}
    (folder / "images").mkdir(parents=True)

    def paint(name, level):
        pixels = np.clip(draw.normal(level, 8, (32, 32)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)

    for n in range(count):
        split = "train" if n < count - 8 else "val" if n < count - 4 else "test"
        paint(f"{n}.png", 128)
        row = {"id": f"s{n}", "subject_id": f"p{n}", "split": split, "image_path": [f"{n}.png"]}
        if kind == "indication":
            word = WORDS[int(draw.integers(4))]
            row |= {"report": f"{word} {word} {word} {word}", "sections": {"indication": word}}
        else:
            old = int(draw.integers(2))
            text = ("new new new new", "unchanged unchanged unchanged unchanged")[old]
            paint(f"{n}_old.png", 240 * old)
            before = {
                "id": f"o{n}",
                "subject_id": f"p{n}",
                "split": split,
                "image_path": [f"{n}_old.png"],
                "report": "old",
            }
            rows[split].append(before)
            row |= {"report": text, "prior": f"o{n}"}
        rows[split].append(row)
    (folder / "annotation.json").write_text(json.dumps(rows))
    return ["--ann_path", folder / "annotation.json", "--image_dir", folder / "images"]


def predicted(model, *flags):
    """The reports that predict.py writes, by study."""
    out = model.parent / f"predicted_{model.stem}.json"
    with mock.patch("sys.argv", [*map(str, ["predict.py", "--load", model, *flags, "--quiet", "--json", out])]):
        assert predict.main() == 0
    return {row["id"]: row["report"] for row in json.loads(out.read_text())["reports"]}


def reports_of_the_test(folder):
    """The reports of the run's own test, in its order."""
    with open(folder / "res.csv", newline="") as file:
        return [row[0] for row in csv.reader(file)]


def losses(folder):
    return json.loads((folder / "history.json").read_text())


# ---- the annotation


def study(name, patient="p", report="text", **more):
    return Study(name, report, (f"{name}.png",), "train", name, ("",), subject_id=patient, **more)


def test_priors_are_the_patients_own_and_texts_have_their_kind():
    studies = [study("a", report="old film"), study("b", prior="a", sections={"indication": "cough now"})]
    studies += [study("c", "q", prior="a"), study("d", prior="gone")]
    tokenizer = Tokenizer.from_reports(["old film cough now"], 1, "coco")
    reader = ContextReader(studies, tokenizer, ("indication", "prior_report"), 60)
    ids, kinds = reader.tokens(studies[1])
    assert kinds == [1, 1, 2, 2] and tokenizer.decode(ids) == "cough now old film"
    assert reader.prior(studies[1]) is studies[0] and reader.texts and not reader.prior_images
    assert reader.prior(studies[2]) is None and reader.prior(studies[3]) is None  # another patient's; not there
    assert reader.prior(replace(studies[1], study_id="a")) is None  # another image of the same study
    by_id = {own.id: own for own in (*studies, study("e", prior="f"), replace(study("f"), split="test"))}
    reasons = [prior_problem(by_id[name], by_id) for name in "bcde"]
    assert reasons == [
        "",
        "it is of another patient ('p', not 'q')",
        "there is no such record",
        "it is of split 'test'",
    ]
    assert ContextReader(studies, tokenizer, ("indication",), 1).tokens(studies[1])[1] == [1]


def test_sections_become_the_report(tmp_path):
    toy(tmp_path, "indication", 24)
    content = json.loads((tmp_path / "annotation.json").read_text())
    for rows in content.values():
        for n, row in enumerate(rows):
            row["sections"] |= {"findings": "Clear lungs."} | ({"impression": "No disease."} if n else {})
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    annotation = read_annotation(tmp_path / "annotation.json")
    both, lost = with_sections(annotation, "both")
    assert lost == 0 and both.splits["train"][0].report == "Findings. Clear lungs."
    assert both.splits["train"][1].report == "Findings. Clear lungs. Impression. No disease."
    impressions, lost = with_sections(annotation, "impression")
    assert lost == 3 and impressions.splits["train"][0].report == "No disease."
    assert impressions.train_sha256 != annotation.train_sha256
    bare = replace(
        annotation,
        splits={name: tuple(replace(s, sections={}) for s in own) for name, own in annotation.splits.items()},
    )
    with pytest.raises(InputError, match="--report_sections findings: .*no record of split 'train'"):
        with_sections(bare, "findings")


def test_wrong_values_are_one_line(tmp_path):
    with pytest.raises(InputError, match="'indications' is none of indication, prior_report, prior_image"):
        parse_contexts("prior_image, indications")
    assert parse_contexts("") == () and parse_contexts("indication,prior_image") == ("indication", "prior_image")
    for flags, reason in (
        ({"context": "indication", "guidance": 0.5}, "--guidance"),
        ({"context": "prior_image", "shards": "x"}, "--shards hold no images"),
    ):
        with pytest.raises(InputError, match=reason):
            Config(**flags)
    toy(tmp_path, "indication", 24)
    content = json.loads((tmp_path / "annotation.json").read_text())
    content["train"][1]["prior"] = content["train"][1]["id"]
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="id 's1': field 'prior' names the record itself"):
        read_annotation(tmp_path / "annotation.json")
    content["train"][0]["sections"] = ["cough"]
    (tmp_path / "annotation.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="id 's0': field 'sections' must be an object of texts"):
        read_annotation(tmp_path / "annotation.json")


# ---- what it teaches


@pytest.mark.thorough
@pytest.mark.parametrize(
    "kind, context", [("indication", "indication"), pytest.param("prior", "prior_image", marks=pytest.mark.slow)]
)
def test_what_only_the_context_says_is_learnt(kind, context, train, tmp_path):
    flags = toy(tmp_path / "data", kind, 168)
    flags += ["--epochs", 3, "--lr_ed", 5e-3, "--batch_size", 4, "--threshold", 1, "--dropout", 0]
    flags += ["--drop_prob_lm", 0, "--d_model", 32, "--cmm_dim", 32, "--d_ff", 32, "--max_seq_length", 8]
    flags += ["--freeze_visual_extractor", "true", "--feature_cache", tmp_path / "features"]
    plain = losses(train(*flags, "--save_dir", tmp_path / "plain"))
    given = losses(train(*flags, "--context", context, "--save_dir", tmp_path / "given"))
    assert given[-1]["train_nll"] < plain[-1]["train_nll"] / 2
    assert given[-1]["val_nll"] < plain[-1]["val_nll"] / 2

    # predict.py reads the same context, from the annotation and, without any report, from a table.
    folder, images = tmp_path / "given", ("--image_dir", tmp_path / "data" / "images")
    reports = predicted(folder / "model_best.pth", "--ann_path", flags[1], *images)
    assert list(reports.values()) == reports_of_the_test(folder) and len(set(reports.values())) > 1
    rows = json.loads(flags[1].read_text())["test"]
    table = "\n".join(
        f"{row['id']},{row['subject_id']},{row['image_path'][0]},{row.get('prior', '')},"
        f"{row.get('sections', {}).get('indication', '')}"
        for row in rows
    )
    (tmp_path / "new.csv").write_text(f"id,subject_id,image_path,prior,indication\n{table}\n")
    assert predicted(folder / "model_best.pth", "--ann_path", tmp_path / "new.csv", *images) == reports
    without = predicted(folder / "model_best.pth", *(images[1] / row["image_path"][0] for row in rows))
    assert list(without.values()) != list(reports.values())


BACKBONES = {
    "xpronet": "--num_cluster 14 --num_protype 2 --d_img_ebd 8 --d_txt_ebd 8 --init_protypes_path=".split(),
    "r2gen": ["--rm_num_slots", 1, "--rm_num_heads", 2, "--rm_d_model", 16],
    "r2gencmn": [],
    "visualgpt": ["--gpt2_layers", 1, "--gpt2_positions", 48, "--tokenizer", "word"],
    "hf": [],
    "hf with a prefix": [
        "--decoder_config",
        '{"model_type": "llama", "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, '
        '"num_attention_heads": 1, "num_key_value_heads": 1}',
    ],
}


@pytest.mark.thorough
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_trains_tests_and_predicts_with_context(backbone, train, tmp_path):
    flags = toy(tmp_path / "data", "prior", 24)
    rows = [",".join(("id", *CLASSES))]
    rows += [",".join((f"{kind}{n}", *(str(int(n % 14 == k)) for k in range(14)))) for n in range(24) for kind in "so"]
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    flags += [
        "--label_path",
        tmp_path / "labels.csv",
        "--model_name",
        backbone.split()[0],
        *BACKBONES[backbone],
        "--context",
        "indication,prior_report,prior_image",
    ]
    folder = train(*flags, "--threshold", 1)
    weights = load_checkpoint(folder / "model_best.pth")["state_dict"]
    assert weights["study_context.types.weight"].shape == (4, weights["study_context.words.weight"].shape[0])
    argv = ["--load", folder / "model_best.pth", "--save_dir", tmp_path / "again"]
    run_testing(*parse_flags(list(map(str, argv)), "main_test.py", ""))
    assert (tmp_path / "again" / "res.csv").read_text() == (folder / "res.csv").read_text()
    predictor = load_predictor(str(folder / "model_best.pth"), {"device": "cpu"})
    [report] = predictor.write(
        [[Image.open(tmp_path / "data" / "images" / "0.png")]], attention=predictor.shows_attention
    )
    image = Image.open(tmp_path / "data" / "images" / "0.png")
    [with_prior] = predictor.write([[image]], contexts=[StudyContext([image], ((1,), (1,)))])
    assert with_prior.log_prob != report.log_prob
    # Room for further views, which are absent, changes nothing.
    own = predictor.transform.normalise(predictor.transform.pixels(image).expand(2, 2, -1, -1, -1))
    text = Context(torch.tensor([[1, 2], [3, 0]]), torch.tensor([[1, 1], [2, 0]]))
    wide, mask = own.new_zeros(2, 6, *own.shape[2:]), torch.zeros(2, 6, dtype=torch.bool)
    wide[:, [0, 3]], mask[:, [0, 3]] = own, True
    begin = torch.zeros(2, 1, dtype=torch.long)
    with torch.no_grad():
        found = [
            predictor.backbone(
                None, begin, features=predictor.backbone.extract(*given, context=text), view_mask=given[1]
            )
            for given in ((own, torch.ones(2, 2, dtype=torch.bool)), (wide, mask))
        ]
    torch.testing.assert_close(found[0].log_probs, found[1].log_probs, rtol=1e-5, atol=1e-5)
    assert report.log_probs or report.end_log_prob is not None
    assert report.maps is None or report.maps.shape[1] == predictor.num_views


def test_a_study_without_context_reads_as_if_there_were_none(train, tmp_path):
    """Masked parts carry nothing: what stands in an absent prior's place does not count."""
    flags = toy(tmp_path / "data", "indication", 24)
    folder = train(*flags, "--context", "indication,prior_image", "--threshold", 1)
    predictor = load_predictor(str(folder / "model_best.pth"), {"device": "cpu"})
    backbone = predictor.backbone
    images = torch.randn(2, 2, 3, 32, 32)
    mask = torch.tensor([[True, False], [True, False]])
    features = backbone.extract(images, mask)
    other = images.clone()
    other[:, 1] = 5.0
    assert torch.equal(backbone.extract(other, mask).pooled, features.pooled)
    begin = torch.zeros(2, 1, dtype=torch.long)
    first = backbone(None, begin, features=features).log_probs
    assert torch.equal(backbone(None, begin, features=backbone.extract(other, mask)).log_probs, first)
    there = backbone.extract(images, torch.ones(2, 2, dtype=torch.bool))
    assert torch.equal(there.pooled, features.pooled) or torch.allclose(there.pooled, features.pooled, atol=1e-5)
    assert not torch.equal(backbone(None, begin, features=there).log_probs, first)


def test_studies_that_a_file_describes(tmp_path):
    toy(tmp_path, "prior", 24)
    images, config = str(tmp_path / "images"), Config(context="prior_report,prior_image", max_views=2)
    tokenizer = Tokenizer.from_reports(["old film"], 1, "coco")
    found = study_files(read_described(str(tmp_path / "annotation.json"), images, "val"), images, config, tokenizer)
    assert [study.name for study in found][-2:] == ["o19", "s19"] and not found[-2].prior
    assert found[-1].prior == (Path(images, "19_old.png"),) and found[-1].texts == (tokenizer.encode("old")[1:-1], [2])
    separate = study_files(
        read_described(str(tmp_path / "annotation.json"), images, "val"), images, Config(views="separate"), tokenizer
    )
    assert separate[-1].name == "s19#0" and not separate[-1].prior
    # By date, in a table without reports; a list of records; an image outside the folder.
    table = tmp_path / "new.csv"
    table.write_text("id,patient,date,image,indication\na,p,2024-01-02,0.png,cough\nb,p,2024-01-01,1.png,\n")
    [after, before] = study_files(read_described(str(table), images, "test"), images, config, tokenizer)
    assert after.prior == before.paths == (Path(images, "1.png"),)
    record = {"id": "a", "image_path": ["0.png"]}
    (tmp_path / "list.json").write_text(json.dumps([record]))
    [only] = study_files(read_described(str(tmp_path / "list.json"), images, "test"), images, config, tokenizer)
    assert only.name == "a" and only.texts == ([], [])
    for content, reason in (([], "split 'test' is empty"), ([record | {"image_path": "../x"}], "inside image_dir")):
        (tmp_path / "list.json").write_text(json.dumps(content))
        with pytest.raises(InputError, match=reason):
            read_described(str(tmp_path / "list.json"), images, "test")
    (tmp_path / "images" / "out.png").symlink_to(table)
    (tmp_path / "list.json").write_text(json.dumps([record | {"image_path": ["out.png"]}]))
    with pytest.raises(InputError, match="study 'a': .*out.png is not in the folder of images"):
        study_files(read_described(str(tmp_path / "list.json"), images, "test"), images, config, tokenizer)


def test_off_is_as_before(demo, train, tmp_path):
    """The same random numbers are drawn with context and without it, and without it nothing is added."""
    plain = load_checkpoint(train() / "model_best.pth")
    assert not any("study_context" in name for name in plain["state_dict"]) and plain["config"]["context"] == ""
