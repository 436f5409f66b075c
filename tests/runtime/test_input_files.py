"""One opener for every file that a flag, a checkpoint or an archive names: what it refuses; nothing goes by it."""

import ast
import os

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from modules.runtime.errors import InputError
from modules.runtime.input_files import (
    load_tensors,
    open_regular,
    open_safetensors,
    read_bytes,
    read_json,
    read_text,
    require_regular,
    require_regular_folder,
)
from tests.project.test_architecture import PRODUCT

# Calls that open a file by its name: whole names, and names of methods (".read_text") of whatever object.
OPENING = (
    *("open", "io.open", "os.open", "np.load", "np.fromfile", "np.memmap", "torch.load", "h5py.File", "safe_open"),
    *("load_file", "mmap.mmap", "Image.open", "tarfile.open", "gzip.open", "bz2.open", "lzma.open", "fsspec.open"),
    *("zipfile.ZipFile", "zipfile.is_zipfile", "gzip.GzipFile", "bz2.BZ2File", "lzma.LZMAFile", "dcmread"),
    *("shutil.copyfile", "shutil.copy", "shutil.copy2", "np.genfromtxt", "np.loadtxt", "ElementTree.parse"),
    *(".read_text", ".read_bytes", ".open", ".from_pretrained", ".read_csv", ".from_file", ".open_memmap"),
)
# What these may be given: names of open files, and what wraps one.
OPEN_FILES = ("file", "opened", "plain", "handle", "_BoundedReads(", "io.BytesIO(", "os.open(", "self._file")
# Where a file is opened by its name all the same: why nothing can come in there, or what has checked it.
ALLOWED = {
    ("modules.runtime.input_files", "os.open"): "the opener itself",
    ("modules.runtime.input_files", "torch.load"): "require_plain_archive comes first",
    ("modules.runtime.input_files", "safe_open"): "require_regular comes first",
    ("modules.runtime.environment", "Path('/proc/cpuinfo').read_text"): "of the kernel",
    ("modules.runtime.cores", "path.read_text"): "of the kernel",
    ("modules.runtime.packages", "path.read_text"): "the project's requirements",
    ("modules.runtime.archive_files", "archive.open"): "a member of an open archive",
    ("modules.data.detection_features", "h5py.File"): "require_regular comes first",
    ("modules.data.feature_cache", "np.load"): "require_regular comes first",
    ("modules.data.shards", "fsspec.open"): "an address",
    ("modules.data.bpe_tokenizer", "GPT2Model.from_pretrained"): "require_regular_folder comes first",
    ("modules.data.bpe_tokenizer", "GPT2TokenizerFast.from_pretrained"): "require_regular_folder comes first",
    ("modules.data.bpe_tokenizer", "AutoTokenizer.from_pretrained"): "require_regular_folder comes first",
    ("models.encoder_decoder_language", "model_class.from_pretrained"): "require_regular_folder comes first",
    ("modules.evaluation.bertscore", "AutoModel.from_pretrained"): "require_regular_folder comes first",
    ("modules.evaluation.bertscore", "AutoTokenizer.from_pretrained"): "require_regular_folder comes first",
    ("modules.labels.chexbert", "kind.from_pretrained"): "require_regular_folder comes first",
    ("modules.layers.hub_encoders", "model_class.from_pretrained"): "require_regular_folder comes first",
    ("modules.mining.transformer_encoder", "AutoTokenizer.from_pretrained"): "require_regular_folder comes first",
    ("modules.mining.transformer_encoder", "model_class.from_pretrained"): "require_regular_folder comes first",
    ("scripts.research.masked_language_model", "AutoConfig.from_pretrained"): "require_regular_folder comes first",
    ("scripts.research.masked_language_model", "AutoTokenizer.from_pretrained"): "of this run's own folder",
    ("modules.prepare.image_placing", "shutil.copyfile"): "is_file comes first",
    ("modules.training.checkpoint_folder", "shutil.copy"): "a checkpoint of this run",
    ("modules.training.checkpoint_folder", "open"): "the copy of it",
    ("modules.training.checkpoint_folder", "os.open"): "a folder, to flush it",
    ("models.settings", "(ROOT / _path(module)).read_text"): "the project's source",
    ("modules.pages.local_page", "(TEMPLATES / 'example.png').read_bytes"): "the project's example",
    ("modules.pages.rendering", "(TEMPLATES / file).read_text"): "the project's templates",
    ("modules.prepare.table_columns", "(PRESETS / f'{name}.json').read_text"): "the project's tables",
    ("scripts.third_party", "file.read_text"): "of an installed package",
    ("scripts.run_experiments", "paths[0].read_text"): "a table that was just written",
}


def opened_by_name(tree):
    """The callees in ``tree`` that are given the name of a file to read."""
    for node in ast.walk(tree):
        callee = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        if not any(callee == name or (name[0] == "." and callee.endswith(name)) for name in OPENING):
            continue
        given = [ast.unparse(part) for part in (*node.args, *(word.value for word in node.keywords))]
        if given and given[0].startswith(OPEN_FILES) and (callee != "np.load" or given[0] == "file"):
            continue
        if any(
            word in ("'w'", "'wb'", "'a'", "'ab'", "'w+'") or "O_WRONLY" in word or "O_CREAT" in word for word in given
        ):
            continue  # to be written
        yield callee


def test_nothing_goes_by_the_opener():
    found = {
        (name, callee)
        for name, source in PRODUCT.items()
        if not name.startswith("benchmarks")
        for callee in opened_by_name(source.tree)
    }
    assert found - ALLOWED.keys() == set(), "open it with modules/runtime/input_files.py"
    assert ALLOWED.keys() - found == set(), "no longer needed"


@pytest.mark.parametrize(
    "code",
    [
        "open(path)",
        "open(path, 'rb')",
        "Path(path).read_text()",
        "np.load(path)",
        "h5py.File(self.file, 'r')",
        "with tarfile.open(path) as archive: pass",
        "Image.open(path)",
        "os.open(path, os.O_RDONLY)",
    ],
)
def test_the_walk_sees_other_ways(code):
    assert list(opened_by_name(ast.parse(code)))


@pytest.mark.parametrize("code", ["open(handle, 'wb')", "open(path, 'w')", "Image.open(file)", "open_regular(path)"])
def test_the_walk_passes_over_others(code):
    assert not list(opened_by_name(ast.parse(code)))


READERS = (open_regular, require_regular, read_bytes, read_text, read_json)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_regular_files_only_and_their_size_first(reader, tmp_path):
    (tmp_path / "text.json").write_text("[1]")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "pipe")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 2**40)
    reader(tmp_path / "text.json", 3)
    for path in ("/dev/zero", "/dev/stdin", tmp_path / "pipe", tmp_path / "link", tmp_path, tmp_path / "absent"):
        with pytest.raises(OSError):
            reader(path)
    for path, most in ((tmp_path / "text.json", 2), (tmp_path / "large", 2**30), ("/proc/self/maps", 0)):
        if reader in (open_regular, require_regular) and str(path).startswith("/proc"):
            continue  # of size 0, and read to its end by nobody
        with pytest.raises(OSError, match="more than the"):
            reader(path, most)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"{", b"\xff\xfe", b"1" * 5000, b"\xef\xbb\xbf{]"])
def test_other_json_is_a_value_error(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "x.json")


@pytest.mark.timeout(20)
def test_libraries_are_kept_from_pipes(tmp_path):
    save_file({"a": np.ones(3)}, tmp_path / "config.json")
    (tmp_path / "below").mkdir()
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    require_regular_folder(tmp_path, "--gpt2_path")
    with open_safetensors(tmp_path / "config.json") as file:
        assert file.get_tensor("a").sum() == 3
    os.mkfifo(tmp_path / "below" / "pipe")
    with pytest.raises(InputError, match=r"--gpt2_path .*: pipe cannot be read: Not a regular file"):
        require_regular_folder(tmp_path, "--gpt2_path")
    with pytest.raises(OSError), open_safetensors(tmp_path / "below" / "pipe"):
        pass
    with pytest.raises(InputError, match="--load .*pipe: cannot be read"):
        load_tensors(tmp_path / "below" / "pipe", "--load")


@pytest.mark.parametrize(
    "content",
    [
        {"a": torch.zeros(1).expand(10**9)},
        {"deep": [{"a": (torch.zeros(2, 1).expand(2, 10**6),)}]},
        {"a": torch.as_strided(torch.zeros(17), (9, 9), (1, 1))},
        {"a": torch.eye(2).to_sparse()},
        {"a": torch.zeros(3, device="meta")},
        [torch.zeros(2**20)] * 1000,
    ],
    ids=["stride 0", "nested", "overlapping", "sparse", "meta", "shared a thousand times"],
)
def test_tensors_have_their_own_bytes(content, tmp_path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=r"--load .*x\.pth: refused"):
        load_tensors(tmp_path / "x.pth", "--load")


def test_tied_weights_and_cycles_are_read(tmp_path):
    weights, cycle = torch.ones(4, 3), []
    cycle.append(cycle)
    content = {"a": weights, "b": weights.t(), "c": weights[:2], "none": torch.zeros(0, 5), "cycle": cycle}
    torch.save(content, tmp_path / "x.pth")
    assert load_tensors(tmp_path / "x.pth", "--load")["b"].shape == (3, 4)
