"""Vision models in folders that transformers and timm wrote themselves: the same patches, without a request."""

import json

import huggingface_hub
import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modules.layers.hub_encoders import describe_encoder, find_encoder, read_description
from modules.layers.size_limits import require_moderate
from modules.layers.visual_extractor import VisualExtractor
from modules.layers.visual_extractor_weights import load_state
from modules.runtime.hub import shared_name

torch.set_num_threads(1)
VIT = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 4, "depths": [1, 1], "num_heads": [1, 1], "window_size": 4}
CONVNEXT = {"hidden_sizes": [4, 4, 8, 8], "depths": [1, 1, 1, 1]}
CVT = {"embed_dim": [4, 4, 8], "num_heads": [1, 1, 2], "depth": [1, 2, 3]}
# Type, sizes, tokens before the patches, patches of an image of 32 pixels.
MODELS = {
    "vit": (VIT, 1, 16),
    "deit": (VIT, 2, 16),
    "beit": (VIT, 1, 16),
    "dinov2": (VIT, 1, 16),
    "dinov2_with_registers": (VIT | {"num_register_tokens": 2}, 3, 16),
    "dinov3_vit": (VIT | {"num_register_tokens": 2}, 3, 16),
    "dinov3_convnext": (CONVNEXT, 1, 1),
    "swin": (SWIN, 0, 64),
    "swinv2": (SWIN, 0, 64),
    "cvt": (CVT, 0, 4),
    "convnext": (CONVNEXT, 0, 1),
    "resnet": ({"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1]}, 0, 16),
    "clip_vision_model": (VIT, 1, 16),
    "siglip_vision_model": (VIT, 0, 16),
}
LOOK = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "size": {"shortest_edge": 40}, "crop_size": 32}


def draw(model):
    """``model`` in evaluation mode with every parameter drawn: biases, positions and scales start as constants."""
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand_like(value) * 0.4 + 0.1)
    return model.eval()


def save(folder, kind, **changed):
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(MODELS[kind][0] | changed))
    model = draw(transformers.AutoModel.from_config(config))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(LOOK | {"do_center_crop": True}))
    return model


def load(folder, size=32, **options):
    name = f"hf:{folder}"
    options = {"pretrained": True, "folder": find_encoder(name), "description": describe_encoder(folder)} | options
    return VisualExtractor(name, image_size=size, **options).eval()


@torch.no_grad()
def close(extractor, images, wanted):
    found, _, pooled = extractor(images.unsqueeze(1))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, wanted.mean(1), rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("kind", MODELS)
def test_patches_are_those_of_transformers(tmp_path, kind):
    model, (_, prefix, patches) = save(tmp_path, kind), MODELS[kind]
    extractor = load(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        hidden = model(pixel_values=images).last_hidden_state
    hidden = hidden.flatten(2).transpose(1, 2) if hidden.dim() == 4 else hidden[:, prefix:]
    assert close(extractor, images, hidden).shape[1] == extractor.patches_per_view == patches
    assert extractor.mean == (0.5, 0.4, 0.3) and extractor.std == (0.2, 0.3, 0.4)
    used = {name for name, parameter in extractor.named_parameters() if parameter.requires_grad}
    extractor(images.unsqueeze(1))[0].square().sum().backward()
    assert not [name for name, part in extractor.named_parameters() if name in used and part.grad is None]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "swin", "clip_vision_model", "siglip_vision_model"])
def test_positions_are_interpolated_to_the_image(tmp_path, kind):
    model, prefix = save(tmp_path, kind), MODELS[kind][1]
    options = {} if kind == "dinov2" else {"interpolate_pos_encoding": True}
    images = torch.randn(1, 3, 48, 48)
    with torch.no_grad():
        hidden = model(pixel_values=images, **options).last_hidden_state
    close(load(tmp_path, 48), images, hidden[:, prefix:])


@pytest.mark.parametrize("size", [224, 518])
def test_a_folder_of_rad_dinos_layout(tmp_path, size):
    """DINOv2 for images of 518 pixels with the image processor that transformers saves beside it."""
    model = save(tmp_path, "dinov2", image_size=518, patch_size=14)
    look = {"image_mean": [0.53] * 3, "image_std": [0.26] * 3, "size": {"shortest_edge": 518}, "crop_size": 518}
    transformers.BitImageProcessor(**look).save_pretrained(tmp_path)
    images = torch.randn(1, 3, size, size)
    with torch.no_grad():
        hidden = model(pixel_values=images).last_hidden_state
    extractor = load(tmp_path, size)
    assert close(extractor, images, hidden[:, 1:]).shape[1] == (size // 14) ** 2
    assert extractor.mean == (0.53,) * 3 and extractor.std == (0.26,) * 3
    assert read_description(describe_encoder(tmp_path)).size == 518


def test_the_tower_of_a_model_of_image_and_text(tmp_path):
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8, "vocab_size": 9}
    config = transformers.CLIPConfig(text_config=text, vision_config=VIT, projection_dim=4)
    model = draw(transformers.CLIPModel(config))
    model.save_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": LOOK}))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        hidden = model.vision_model(pixel_values=images).last_hidden_state
    close(load(tmp_path), images, hidden[:, 1:])
    assert read_description(describe_encoder(tmp_path)).size == 40  # without a crop, the shortest edge


def test_heads_around_the_model_are_left_out(tmp_path):
    config = CONFIG_MAPPING["dinov2"](**VIT, num_labels=3)
    model = draw(transformers.Dinov2ForImageClassification(config))
    model.save_pretrained(tmp_path)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        hidden = model.dinov2(pixel_values=images).last_hidden_state
    close(load(tmp_path), images, hidden[:, 1:])


def test_the_class_token_as_the_image_feature(tmp_path):
    model = save(tmp_path, "dinov2_with_registers")
    extractor = load(tmp_path, pooling="class")
    images = torch.randn(2, 2, 3, 32, 32)
    with torch.no_grad():
        hidden = model(pixel_values=images.flatten(0, 1)).last_hidden_state.unflatten(0, (2, 2))
        patches, _, pooled = extractor(images)
        _, _, of_one = extractor(images, torch.tensor([[True, True], [True, False]]))
    torch.testing.assert_close(patches, hidden[:, :, 3:].flatten(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, hidden[:, :, 0].mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_one[1], hidden[1, 0, 0], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="no class token"):
        VisualExtractor("resnet18", pooling="class")


def test_a_model_of_one_channel_sees_grey(tmp_path):
    model = save(tmp_path, "vit", num_channels=1)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(LOOK | {"image_mean": [0.5], "image_std": [0.25]}))
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        hidden = model(pixel_values=grey).last_hidden_state
    extractor = load(tmp_path)
    close(extractor, grey.expand(-1, 3, -1, -1), hidden[:, 1:])
    assert extractor.std == (0.25, 0.25, 0.25)


def test_a_checkpoint_needs_the_description_alone(tmp_path):
    save(tmp_path, "dinov2")
    first = load(tmp_path)
    again = VisualExtractor("hf:owner/gone", image_size=32, description=describe_encoder(tmp_path)).eval()
    again.load_state_dict(first.state_dict())
    images = torch.randn(1, 1, 3, 32, 32)
    assert torch.equal(again(images)[0], first(images)[0])


def timm_folder(folder, name, *, prefix="", **options):
    torch.manual_seed(0)
    model = draw(timm.create_model(name, pretrained=False, num_classes=0, **options))
    save_file(
        {prefix + key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors"
    )
    return model


def test_a_folder_of_timm(tmp_path):
    options = {"img_size": 64, "depth": 1, "embed_dim": 16, "num_heads": 2, "in_chans": 1}
    model = timm_folder(tmp_path, "vit_tiny_patch16_224", **options)
    look = {"mean": [0.1], "std": [0.2], "input_size": [1, 64, 64]}
    found = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": look, "model_args": options}
    (tmp_path / "config.json").write_text(json.dumps(found))
    grey = torch.randn(1, 1, 64, 64)
    with torch.no_grad():
        close(load(tmp_path, 64), grey.expand(-1, 3, -1, -1), model.forward_features(grey)[:, 1:])
        wider = timm.create_model("vit_tiny_patch16_224", **options | {"img_size": 96}, num_classes=0).eval()
        fitted = timm.models.vision_transformer.checkpoint_filter_fn(model.state_dict(), wider)
        wider.load_state_dict(fitted)
        grey = torch.randn(1, 1, 96, 96)
        close(load(tmp_path, 96), grey.expand(-1, 3, -1, -1), wider.forward_features(grey)[:, 1:])


def test_the_tower_of_an_open_clip_folder(tmp_path):
    model = timm_folder(tmp_path, "resnet18", prefix="visual.trunk.")
    (tmp_path / "model.safetensors").rename(tmp_path / "open_clip_model.safetensors")
    tower = {"timm_model_name": "resnet18", "image_size": 32}
    found = {"model_cfg": {"vision_cfg": tower}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(found))
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        close(load(tmp_path), images, model.forward_features(images).flatten(2).transpose(1, 2))


def test_a_weights_file_of_another_image_size_fits_timms_dinov2(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=56)
    torch.save(source.state_dict(), tmp_path / "dinov2.pth")
    extractor = VisualExtractor("vit_small_patch14_dinov2", weights=str(tmp_path / "dinov2.pth"), image_size=28)
    assert extractor.patches_per_view == 4
    torch.testing.assert_close(extractor.model.model.blocks[0].mlp.fc1.weight, source.blocks[0].mlp.fc1.weight)


def test_a_densenet_of_torchxrayvision(tmp_path):
    """Its own network: torchvision's with one channel, and pixels between -1024 and 1024."""
    torch.manual_seed(0)
    source = torchvision.models.densenet121(num_classes=18)
    source.features.conv0 = torch.nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    torch.save(source.state_dict() | {"op_threshs": torch.zeros(18)}, tmp_path / "xrv.pth")
    extractor = VisualExtractor("xrv:densenet121", weights=str(tmp_path / "xrv.pth"), image_size=64).eval()
    pixels = torch.rand(1, 1, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (extractor.mean, extractor.std))
    with torch.no_grad():
        wanted = source.eval().features((2 * pixels - 1) * 1024).relu().flatten(2).transpose(1, 2)
        found = extractor(((pixels - mean) / std).unsqueeze(1))[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * wanted.max().item())
    with pytest.raises(ValueError, match="give its weights as a file"):
        VisualExtractor("xrv:densenet121", pretrained=True)


def test_weights_of_one_channel_give_the_same_for_grey_images():
    source, own = (torch.nn.Sequential(torch.nn.Conv2d(n, 4, 3), torch.nn.Conv2d(4, 2, 3)) for n in (1, 3))
    load_state(own, source.state_dict(), "file")
    grey = torch.randn(1, 1, 8, 8)
    torch.testing.assert_close(own(grey.expand(-1, 3, -1, -1)), source(grey), rtol=1e-5, atol=1e-5)


def test_what_is_no_vision_model_is_refused_in_a_line(tmp_path):
    with pytest.raises(ValueError, match="no such folder, nor a hub id"):
        find_encoder("hf:/nowhere")
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        describe_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert' is not one"):
        describe_encoder(tmp_path)
    for text in ("", "[]", '{"library": "os"}', '{"mean": 1, "std": 1, "size": 1, "library": "timm"}'):
        with pytest.raises(ValueError, match="visual_extractor_config: not the description"):
            VisualExtractor("hf:x", description=text)


@pytest.mark.parametrize(
    "files, reason",
    [
        ({"config.json": {"model_type": ["vit"]}}, r"model_type \['vit'\] is not one"),
        ({"config.json": {"model_type": "clip", "vision_config": [1]}}, "'vision_config'"),
        (
            {"config.json": {"model_type": "vit"}, "preprocessor_config.json": []},
            "preprocessor_config.json is not a JSON",
        ),
        (
            {"config.json": {"model_type": "vit"}, "preprocessor_config.json": None},
            "preprocessor_config.json cannot be",
        ),
        (
            {"config.json": {"model_type": "vit"}, "processor_config.json": {"image_processor": 1}},
            "image_processor 1 is",
        ),
        ({"config.json": {"model_type": "vit"}, "preprocessor_config.json": {"image_std": [0, 0, 0]}}, "not above 0"),
        (
            {"config.json": {"model_type": "vit"}, "preprocessor_config.json": {"image_mean": None}},
            "mean None is not 3",
        ),
        (
            {"config.json": {"model_type": "vit"}, "preprocessor_config.json": {"rescale_factor": 2 / 255}},
            "rescale_factor 0.00784314; pixels are divided by 255 here",
        ),
        ({"config.json": {"architecture": "resnet18", "pretrained_cfg": 1}}, "pretrained_cfg 1 is not a JSON object"),
        ({"config.json": {"architecture": "resnet18", "pretrained_cfg": {"mean": [1, 2]}}}, "is not 3 numbers"),
        ({"open_clip_config.json": {"model_cfg": None}}, "its vision tower is not timm's"),
        ({"open_clip_config.json": {"model_cfg": {"vision_cfg": [1]}}}, r"vision_cfg \[1\] is not a JSON object"),
    ],
)
def test_a_malformed_folder_is_one_line(tmp_path, files, reason):
    for name, content in files.items():
        (tmp_path / name).write_text("{broken" if content is None else json.dumps(content))
    with pytest.raises(ValueError, match=f"^visual_extractor hf:{tmp_path}: .*{reason}") as caught:
        describe_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_what_a_folder_leaves_empty_is_as_if_it_were_absent(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": None}))
    assert read_description(describe_encoder(tmp_path)).size == 224
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "resnet18", "pretrained_cfg": {"input_size": 96}})
    )
    assert read_description(describe_encoder(tmp_path)).size == 96


@pytest.mark.parametrize(
    "described",
    [
        {"library": "transformers", "config": VIT | {"model_type": "vit", "num_attention_heads": 0}},
        {"library": "transformers", "config": VIT | {"model_type": "vit", "hidden_size": 0}},
        {"library": "transformers", "config": VIT | {"model_type": "vit", "patch_size": 0}},
        {"library": "transformers", "config": VIT | {"model_type": "vit", "hidden_size": "8"}},
        {"library": "transformers", "config": CONVNEXT | {"model_type": "convnext", "hidden_sizes": [0]}},
        {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": {"patch_size": 0}},
        {"library": "timm", "architecture": "vit_tiny_patch16_224", "args": {"num_heads": 0}},
        {"library": "timm", "architecture": "resnet18.nope", "args": {}},
    ],
)
def test_sizes_that_no_model_has_are_one_line(described):
    look = {"mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    with pytest.raises(
        ValueError, match=r"^visual_extractor hf:x/y: its configuration describes no model \("
    ) as caught:
        VisualExtractor("hf:x/y", image_size=32, description=json.dumps(described | look))
    assert "\n" not in str(caught.value)


def test_sizes_that_only_the_first_image_shows_to_be_none_are_one_line():
    config = SWIN | {"model_type": "swin", "window_size": 0}
    described = {"library": "transformers", "config": config, "mean": [0.5] * 3, "std": [0.5] * 3, "size": 32}
    with pytest.raises(ValueError, match="hf:x/y: takes no image_size of 32"):
        VisualExtractor("hf:x/y", image_size=32, description=json.dumps(described))


def test_a_rotary_base_and_ids_of_tokens_are_no_sizes():
    large = 5_000_000
    require_moderate({"rope_theta": large, "eos_token_id": [large], "rope_parameters": {"rope_theta": large}})
    with pytest.raises(ValueError, match="a size of 5000000"):
        require_moderate({"layers": [{"hidden_size": large}], "rope_theta": 1})


def absent():
    raise huggingface_hub.errors.LocalEntryNotFoundError("not here")


def test_a_hub_that_cannot_be_reached_says_how_its_folder_is_given(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: absent())
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: absent())
    with pytest.raises(ValueError, match="--visual_extractor hf:owner/name: .*'--visual_extractor hf:DIR'$"):
        find_encoder("hf:owner/name")


def test_an_image_that_patches_do_not_tile_is_refused(tmp_path):
    save(tmp_path, "dinov2")
    with pytest.raises(ValueError, match="image_size 36 is no multiple of its patch size 8; 32 is the nearest"):
        load(tmp_path, 36)


def test_weights_that_lack_tensors_are_refused(tmp_path):
    save(tmp_path, "vit")
    state = transformers.AutoModel.from_pretrained(tmp_path).state_dict()
    save_file(
        {name: value for name, value in state.items() if "layernorm_after" not in name}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match="its weights lack .* tensors, such as"):
        load(tmp_path)


@pytest.mark.parametrize(
    "entries", [{"auto_map": {"AutoModel": "evil.Model"}}, {"_attn_implementation": "owner/kernel"}, {"dtype": "evil"}]
)
def test_a_description_names_no_code(tmp_path, entries):
    save(tmp_path, "vit")
    described = json.loads(describe_encoder(tmp_path))
    described["config"] |= entries
    extractor = VisualExtractor("hf:x", description=json.dumps(described), image_size=32)
    assert not set(entries) & set(extractor.model.model.config.to_diff_dict()) - {"dtype"}
    assert extractor.model.model.config._attn_implementation in ("sdpa", "eager")


def test_others_are_not_told_a_folder(tmp_path):
    assert shared_name(f"hf:{tmp_path}/rad-dino") == "hf:rad-dino"
    assert shared_name("hf:microsoft/rad-dino") == "hf:microsoft/rad-dino" and shared_name("resnet101") == "resnet101"
