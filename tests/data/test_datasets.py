"""Samples and batches: views, negatives, keyed augmentation, order, resuming, shares, unreadable images."""

import pickle
import time

import numpy as np
import pytest
import torch
from PIL import Image

from modules.data.annotations import Study
from modules.data.datasets import ReportDataset, _report_keys, build_loader
from modules.data.images import ImageFolder
from modules.data.sample_order import AUGMENT_POSITIVE, keyed_generator
from modules.data.tokenizers import Tokenizer
from modules.data.transforms import eval_transform, train_transform
from modules.runtime.errors import InputError
from tests.transform_support import LOOK

torch.set_num_threads(1)
SIZE = 16


def study(name, images=2, report=None, **fields):
    paths = tuple(f"{name}/{view}.png" for view in range(images))
    fields = {"study_id": name, "views": ("",) * images} | fields
    return Study(name, report or f"Report of {name} .", paths, "train", **fields)


@pytest.fixture
def make(tmp_path):
    """Data set over studies whose images are flat: study number * 10 + view number tells which one was read."""

    def make(studies, **options):
        for number, one in enumerate(studies):
            for view, path in enumerate(one.image_paths):
                (tmp_path / path).parent.mkdir(exist_ok=True)
                Image.new("L", (20, 24), number * 10 + view).save(tmp_path / path)
        reports = [one.report for one in studies]
        options = {"transform": eval_transform(SIZE, *LOOK), "max_seq_length": 60} | options
        tokenizer = Tokenizer.from_reports(reports, 1, "iu_xray")
        return ReportDataset(studies, tokenizer, ImageFolder(tmp_path), **options)

    return make


def shown(images):
    """Which flat image each view shows (-1 where the values differ); black is image 0 or an absent view."""
    values = images.flatten(-3).int()
    return torch.where((values == values[..., :1]).all(-1), values[..., 0], -1).tolist()


def whole(dataset, batch_size=64, **options):
    return next(iter(build_loader(dataset, batch_size, shuffle=False, **options)))


# ---- views and tokens


def test_paired_views_and_absent_ones(make):
    batch = whole(make([study("a"), study("b", images=1), study("c", images=3)]))
    assert batch.positive.images.shape == (3, 2, 3, SIZE, SIZE)
    assert shown(batch.positive.images) == [[0, 1], [10, 0], [20, 21]]
    assert batch.positive.view_mask.tolist() == [[True, True], [True, False], [True, True]]
    assert batch.ids == ["a", "b", "c"] and batch.sample_index.tolist() == [0, 1, 2]
    assert batch.negative is None and batch.has_negative is None and batch.positive.labels is None


def test_images_are_normalised_on_the_way_to_the_device(varied):
    batch = whole(varied)
    assert batch.positive.images.dtype == batch.negative.images.dtype == torch.uint8
    moved = batch.to("cpu")
    expected = varied.transform(varied.read_image("s4/0.png"), keyed_generator(7, 0, AUGMENT_POSITIVE, 4, 0))
    assert torch.equal(moved.positive.images[4, 0], expected)
    normalised, present = varied.transform.normalise(batch.negative.images), batch.negative.view_mask
    assert torch.equal(moved.negative.images, torch.where(present[..., None, None, None], normalised, 0))
    assert torch.equal(moved.to("cpu").positive.images, moved.positive.images)


def test_absent_views_are_zero_after_normalisation(make):
    images = whole(make([study("a"), study("b", images=1)])).to("cpu").positive.images
    assert not images[1, 1].any() and images[0, 0].all()


def test_mimic_reads_the_first_image_only(make):
    batch = whole(make([study("a"), study("b")], max_views=1))
    assert shown(batch.positive.images) == [[0], [10]]


def test_one_image_per_study_makes_one_view(make):
    assert whole(make([study("a", images=1), study("b", images=1)])).positive.images.shape[1] == 1


def test_separate_views_are_samples_of_their_own(make):
    batch = whole(make([study("a"), study("b", images=1), study("c", images=3)], views="separate"))
    assert shown(batch.positive.images) == [[0], [1], [10], [20], [21], [22]]
    assert batch.ids == ["a#0", "a#1", "b#0", "c#0", "c#1", "c#2"]
    assert batch.reports[0] == batch.reports[1] == "Report of a ."
    assert batch.sample_index.tolist() == list(range(6)) and batch.positive.view_mask.all()


def test_tokens_are_cut_padded_and_masked(make):
    dataset = make([study("a", report="one two three four five ."), study("b", report="one .")], max_seq_length=5)
    batch = whole(dataset)
    ids = dataset.tokenizer.token2idx
    assert batch.positive.tokens.tolist() == [
        [0, ids["one"], ids["two"], ids["three"], ids["four"]],  # the end fell to the cut
        [0, ids["one"], ids["."], 0, 0],
    ]
    assert batch.positive.token_mask.tolist() == [[True] * 5, [True] * 4 + [False]]


def test_report_keys_join_equal_texts_and_equal_studies(make):
    studies = [
        study("a", report="Clear lungs."),
        study("b", report="clear LUNGS"),
        study("c", report="Effusion.", study_id="s"),
        study("d", report="Nodule.", study_id="s"),
        study("e", report="Normal heart."),
        study("f", report="Nodule!"),
    ]
    a, b, c, d, e, f = whole(make(studies)).report_key.tolist()
    assert a == b and c == d == f and len({a, c, e}) == 3


def test_report_keys_of_many_studies_that_share_a_text_take_no_time():
    shared = {"x": "chest x-ray"}
    studies = [study(f"{n}#{part}", report=shared.get(part), study_id=str(n)) for n in range(4000) for part in "xy"]
    started = time.process_time()
    assert set(_report_keys(studies, "coco")) == {0}
    assert time.process_time() - started < 2


def test_labels_follow_study_and_negative(make):
    labels = np.eye(14)[:2]
    batch = whole(make([study("a"), study("b")], labels=labels, neighbours=np.array([[1], [0]]), views="separate"))
    assert batch.positive.labels.dtype == torch.float32
    assert batch.positive.labels.tolist() == labels[[0, 0, 1, 1]].tolist()
    assert batch.negative.labels.tolist() == labels[[1, 1, 0, 0]].tolist()


# ---- hard negatives


def test_nearest_neighbour_is_the_negative(make):
    dataset = make([study("a"), study("b"), study("c")], neighbours=np.array([[2, 1], [0, 2], [-1, -1]], np.int32))
    batch = whole(dataset)
    assert shown(batch.negative.images) == [[20, 21], [0, 1], [20, 21]]
    assert batch.has_negative.tolist() == [True, True, False]
    texts = dataset.tokenizer.decode_batch(batch.negative.tokens[:, 1:])
    assert texts == ["report of c .", "report of a .", "report of c ."]


def test_separate_negatives_take_the_same_view_or_the_first(make):
    neighbours = np.array([[1], [2], [0]], np.int32)
    batch = whole(
        make([study("a"), study("b", images=1), study("c", images=3)], neighbours=neighbours, views="separate")
    )
    #       a#0   a#1   b#0   c#0  c#1  c#2
    assert shown(batch.negative.images) == [[10], [10], [20], [0], [1], [0]]


def test_paired_negative_of_a_study_with_one_image(make):
    batch = whole(make([study("a"), study("b", images=1)], neighbours=np.array([[1], [0]])))
    assert batch.negative.view_mask.tolist() == [[True, False], [True, True]]


def test_mochi_draws_from_the_first_neighbours_by_epoch_and_index(make):
    rows = np.tile(np.array([1, 2, 3, 4], np.int32), (5, 1))
    rows[0, 1:] = -1
    dataset = make([study(name) for name in "abcde"], neighbours=rows, num_neighbours=3)
    drawn = {index: [shown(dataset[epoch, index].negative.images)[0] for epoch in range(60)] for index in (0, 1, 2)}
    assert set(drawn[0]) == {10}
    assert set(drawn[1]) == {10, 20, 30} and min(map(drawn[1].count, (10, 20, 30))) > 8  # 20 each on average
    assert drawn[1] != drawn[2]
    assert drawn[1][7] == shown(dataset[7, 1].negative.images)[0]


def test_annotation_negatives(make):
    own = {"negative_report": "Other text .", "negative_image_paths": ("b/0.png",)}
    studies = [study("a", images=1, **own), study("b", images=1), study("c", images=1, negative_report="No image .")]
    dataset = make(studies, annotation_negatives=True)
    batch = whole(dataset)
    assert shown(batch.negative.images) == [[10], [10], [20]] and batch.has_negative.tolist() == [True, False, False]
    assert dataset.tokenizer.decode(batch.negative.tokens[0, 1:].tolist()) == "<unk> <unk> ."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": np.zeros((3, 1), int)}, r"shape \(3, 1\), expected a row for each of 2 studies"),
        ({"neighbours": np.array([[1], [2]])}, r"holds rows outside -1\.\.1"),
        ({"neighbours": np.array([[1], [0]]), "num_neighbours": 5}, "--num_neighbours 5: the negative index holds 1"),
        ({"labels": np.zeros((3, 14))}, "3 rows for 2 studies"),
        ({"labels": np.zeros((2, 14)), "annotation_negatives": True}, "the annotation's own negatives have none"),
    ],
)
def test_index_and_labels_must_fit(make, options, message):
    with pytest.raises(InputError, match=message):
        make([study("a"), study("b")], **options)


# ---- keys


@pytest.fixture
def varied(tmp_path):
    """Data set of 11 noisy studies with random crops, one neighbour each."""
    studies = [study(f"s{number}", images=1 + number % 2) for number in range(11)]
    rng = np.random.default_rng(0)
    for path in [path for one in studies for path in one.image_paths]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40), dtype=np.uint8)).save(tmp_path / path)
    tokenizer = Tokenizer.from_reports([one.report for one in studies], 1, "iu_xray")
    return ReportDataset(
        studies, tokenizer, ImageFolder(tmp_path), train_transform(SIZE, *LOOK, resize=24), max_seq_length=60, seed=7,
        neighbours=np.roll(np.arange(11, dtype=np.int32), 1)[:, None],
    )  # fmt: skip


def epoch_of(loader, epoch, seen=0):
    loader.set_epoch(epoch, seen)
    return list(loader)


def equal(first, second):
    return len(first) == len(second) and all(
        one.ids == other.ids
        and torch.equal(one.positive.images, other.positive.images)
        and torch.equal(one.negative.images, other.negative.images)
        for one, other in zip(first, second, strict=True)
    )


def test_epochs_do_not_depend_on_workers_or_history(varied):
    alone = build_loader(varied, 4, shuffle=True, num_workers=0, seed=3)
    second = epoch_of(alone, 2)
    assert equal(second, epoch_of(alone, 2)) and not equal(second, epoch_of(alone, 1))
    workers = build_loader(varied, 4, shuffle=True, num_workers=2, seed=3)
    assert equal(epoch_of(workers, 1), epoch_of(alone, 1))  # persistent workers hear of the next epoch
    assert equal(epoch_of(workers, 2), second)
    assert not equal(second, epoch_of(build_loader(varied, 4, shuffle=True, seed=4), 2))


def test_augmentation_differs_by_epoch_sample_view_and_role(varied):
    crops = [varied[1, 1].positive.images[0], varied[2, 1].positive.images[0], varied[1, 2].negative.images[0]]
    assert varied.neighbours[2, 0] == 1
    assert not any(torch.equal(crops[i], crops[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    path = varied.studies[1].image_paths[0]
    twice = ReportDataset(
        [study("t")], varied.tokenizer, lambda _path: varied.read_image(path), varied.transform, max_seq_length=60
    )[0].positive.images
    assert not torch.equal(twice[0], twice[1])


def test_a_resumed_epoch_goes_on_at_its_batch(varied):
    loader = build_loader(varied, 3, shuffle=True, num_workers=2, seed=3)
    complete = epoch_of(loader, 5)
    for start in range(5):
        assert equal(epoch_of(build_loader(varied, 3, shuffle=True, seed=3), 5, 3 * start), complete[start:])
    assert equal(epoch_of(loader, 5, 6), complete[2:]) and equal(epoch_of(loader, 5), complete)


def test_loading_leaves_the_global_random_state_alone(varied):
    before = torch.get_rng_state()
    epoch_of(build_loader(varied, 4, shuffle=True), 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_every_sample_comes_once_in_a_new_order(varied):
    loader = build_loader(varied, 4, shuffle=True, seed=3)
    orders = [[index for batch in loader.batch_sampler for _, index in batch] for epoch in (1, 2)
              if loader.set_epoch(epoch) is None]  # fmt: skip
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(11)) and orders[0] != orders[1]
    assert len(loader) == 3 and len(build_loader(varied, 4, shuffle=True, drop_last=True)) == 2


# ---- unreadable images


def complaint(loader):
    """Message of the InputError that ends the epoch (pytest.raises would keep the workers alive after it)."""
    try:
        for _ in loader:
            pass
    except InputError as error:
        return str(error)
    return "none"


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "outside"])
def test_an_unreadable_image_is_named_in_one_line(make, tmp_path, damage, num_workers):
    dataset = make([study("a"), study("b"), study("c")])
    path = tmp_path / "b" / "1.png"
    content = path.read_bytes()
    path.unlink()
    if damage == "outside":
        (tmp_path.parent / "secret.png").write_bytes(content)
        path.symlink_to(tmp_path.parent / "secret.png")
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello"}[damage])
    message = complaint(build_loader(dataset, 4, shuffle=True, num_workers=num_workers))
    assert message.startswith("split 'train', study 'b': image ") and "b/1.png'" in message and "\n" not in message


def test_unreadable_images_are_replaced_the_same_way_every_time(make, tmp_path):
    studies = [study(f"s{number}", images=1) for number in range(150)]
    dataset = make(studies, on_bad_image="skip")
    (tmp_path / "s5" / "0.png").write_bytes(b"")
    for num_workers in (0, 2):
        loader = build_loader(dataset, 50, shuffle=False, num_workers=num_workers)
        batches = epoch_of(loader, 1)
        assert [batch.replaced for batch in batches] == [1, 0, 0] and loader.replaced == 1
        stand_in = batches[0].ids[5]
        assert stand_in == dataset[1, 5].id != "s5"
        assert batches[0].sample_index[5] == int(stand_in[1:])
        epoch_of(loader, 2)
        assert loader.replaced == 1  # counted per epoch


@pytest.mark.parametrize("num_workers", [0, 2])
def test_more_than_one_percent_replaced_stops_the_run(make, tmp_path, num_workers):
    dataset = make([study(f"s{number}", images=1) for number in range(150)], on_bad_image="skip")
    for number in (5, 70):
        (tmp_path / f"s{number}" / "0.png").write_bytes(b"")
    loader = build_loader(dataset, 50, shuffle=False, num_workers=num_workers)
    assert "2 of 150 samples of this epoch could not be read, more than 1%" in complaint(loader)
    assert loader.replaced == 2


def test_nothing_readable_ends_with_the_first_problem(make, tmp_path):
    dataset = make([study("a", images=1)], on_bad_image="skip")
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(InputError, match="study 'a': image .* nor could 100 other samples be read"):
        dataset[0]


# ---- batches


def test_moving_a_batch_keeps_everything_else(make):
    batch = whole(make([study("a"), study("b")], neighbours=np.array([[1], [-1]]), labels=np.zeros((2, 14))))
    moved = batch.to("meta")
    for pair in (moved.positive, moved.negative):
        assert {t.device.type for t in (pair.images, pair.tokens, pair.token_mask, pair.labels)} == {"meta"}
        assert pair.view_mask.device.type == "cpu"
    assert {t.device.type for t in (moved.has_negative, moved.sample_index, moved.report_key)} == {"meta"}
    assert moved.positive.images.dtype == torch.float32
    assert (moved.ids, moved.reports, moved.replaced) == (batch.ids, batch.reports, 0)
    assert batch.positive.images.device.type == "cpu"


def test_data_sets_travel_to_spawned_workers(varied):
    copy = pickle.loads(pickle.dumps(varied))
    assert torch.equal(copy[1, 3].positive.images, varied[1, 3].positive.images)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_pinned_batches(make):
    batch = whole(make([study("a"), study("b")], neighbours=np.array([[1], [0]])), pin_memory=True)
    assert batch.positive.images.is_pinned() and batch.negative.tokens.is_pinned() and batch.has_negative.is_pinned()
    moved = batch.to("cuda").positive.images
    assert moved.device.type == "cuda" and torch.equal(moved.cpu(), batch.to("cpu").positive.images)
