"""The shell scripts, run for real in a folder of their own with stand-ins for Python, uv and nvidia-smi."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from modules.flags import parse_flags, resolve_config

ROOT = Path(__file__).resolve().parents[2]
RUN_SCRIPTS = sorted(ROOT.glob("run_*.sh"))
SCRIPTS = [*sorted(ROOT.glob("*.sh")), *sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
STUDIES = ["run_iu_xray.sh", "run_mimic_cxr.sh"]
CAPTIONS = "run_coco.sh"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_syntax(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "set -euo pipefail" in script.read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", RUN_SCRIPTS, ids=lambda path: path.name)
def test_arguments_are_passed_on(script):
    assert '"$@"' in script.read_text()


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# ---- run_iu_xray.sh, run_mimic_cxr.sh: a stand-in for Python writes down what it is called with


@pytest.fixture
def study(tmp_path):
    """A copy of the run scripts; returns a function that runs one and gives the calls of Python, a list of lists."""
    (tmp_path / "scripts").mkdir()
    for name in (*STUDIES, CAPTIONS, "scripts/mine_train_test.sh"):
        shutil.copy(ROOT / name, tmp_path / name)
    record = f"import json, sys; print(json.dumps(sys.argv[1:]), file=open({str(tmp_path / 'calls')!r}, 'a'))"
    # Questions to the project's own tables are answered.
    asked = f'[ "$1" = -c ] && cd {ROOT} && exec {sys.executable} "$@"'
    executable(tmp_path / ".venv/bin/python", f'#!/bin/sh\n{asked}\nexec {sys.executable} -c "{record}" "$@"\n')

    def run(script, *arguments, **environment):
        (tmp_path / "calls").write_text("")
        subprocess.run(["bash", tmp_path / script, *arguments], cwd="/", check=True, env=os.environ | environment)
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    run.folder = tmp_path
    return run


def value(call, flag):
    return call[len(call) - 1 - call[::-1].index(flag) + 1]


@pytest.mark.parametrize("script", STUDIES)
def test_study_mines_trains_and_tests(study, script):
    dataset = script.removeprefix("run_").removesuffix(".sh")
    mining, training = study(script, "--epochs", "2", "--exp_name", "two words")
    index = f"results/{dataset}/hard_negatives.safetensors"
    assert mining[0] == "scripts/mine_hard_negatives.py" and "RadBERT" in value(mining, "--text_encoder")
    assert value(mining, "--out") == value(training, "--negative_index") == index
    assert training[0] == "main_train.py"  # which ends with the test of the best model
    given, ignored = parse_flags(training[1:], "main_train.py", "")
    config = resolve_config(given)
    assert not ignored
    assert (config.precision, config.tf32, config.eval_batch_size) == ("auto", True, 64)
    # Sec. 4.2 of the paper; what the user gave comes last and wins.
    assert (config.batch_size, config.lr_ve, config.lr_ed, config.weight_decay) == (16, 1e-4, 1e-4, 5e-5)
    assert (config.lr_scheduler, config.gamma, config.alpha) == ("ReduceLROnPlateau", 0.1, 0.01)
    assert (config.dataset_name, config.epochs, config.exp_name) == (dataset, 2, "two words")


def test_coco_takes_visualgpts_published_settings(study):
    mining, training = study(CAPTIONS, "--strategy", "mochi")
    assert (value(mining, "--dataset_name"), value(mining, "--text_encoder")) == ("coco", "minilm")
    config = resolve_config(parse_flags(training[1:], "main_train.py", "")[0])
    assert (config.model_name, config.strategy, config.alpha) == ("visualgpt", "mochi", 0.1)
    assert (config.optim, config.lr_ed, config.clip_norm, config.tau) == ("AdamW", 1e-4, 1.0, 0.2)
    assert (config.batch_size * config.grad_accumulation, config.beam_size, config.max_seq_length) == (50, 5, 20)
    assert config.collapse_repeats and config.detection_features == "data/coco/coco_detections.hdf5"
    _, training = study(CAPTIONS, "--backbone", "r2gencmn", "--save_dir", "other", TEXT_ENCODER="tfidf")
    config = resolve_config(parse_flags(training[1:], "main_train.py", "")[0])
    assert (config.model_name, config.threshold, config.beam_size, config.lr_ed) == ("r2gencmn", 5, 5, 5e-4)


def test_study_takes_a_backbones_own_settings(study):
    _, training = study("run_mimic_cxr.sh", "--backbone", "r2gencmn", "--lr_ve", "1e-5")
    config = resolve_config(parse_flags(training[1:], "main_train.py", "")[0])
    assert (config.lr_ve, config.lr_ed, config.lr_scheduler, config.step_size) == (1e-5, 5e-4, "StepLR", 3)
    assert (config.epochs, config.max_seq_length, config.threshold, config.strategy) == (30, 100, 10, "ithn")


def test_study_follows_the_users_flags(study):
    mining, training = study(
        "run_iu_xray.sh",
        "--ann_path=other.json",
        "--save_dir",
        "out dir",
        "--num_neighbours",
        "9",
        "--n_gpu",
        "8",
        "--device",
        "cuda",
        TEXT_ENCODER="tfidf",
    )
    assert value(mining, "--ann_path") == "other.json"
    assert (value(mining, "--text_encoder"), value(mining, "--top_k")) == ("tfidf", "9")
    assert (value(mining, "--n_gpu"), value(mining, "--device")) == ("8", "cuda")
    assert value(training, "--negative_index") == "out dir/hard_negatives.safetensors"


def test_study_mines_only_where_it_must(study):
    index = study.folder / "results/iu_xray/hard_negatives.safetensors"
    index.parent.mkdir(parents=True)
    index.touch()
    assert [call[0] for call in study("run_iu_xray.sh")] == ["main_train.py"]
    index.unlink()
    (plain,) = study("run_iu_xray.sh", "--ithn", "off")
    assert plain[0] == "main_train.py" and "--negative_index" not in plain
    (without,) = study("run_iu_xray.sh", "--strategy", "contrastive")
    assert without[0] == "main_train.py" and "--negative_index" not in without
    (own,) = study("run_iu_xray.sh", "--negative_index", "")
    assert own[0] == "main_train.py" and value(own, "--negative_index") == ""


def test_study_help_runs_nothing(study):
    assert study("run_iu_xray.sh", "--help") == []


# ---- setup.sh: a stand-in for uv writes down what it is asked to install


@pytest.fixture
def project(tmp_path):
    """setup.sh with one requirement that every environment meets; returns a function that runs it."""
    (tmp_path / "requirements").mkdir()
    for name in ("setup.sh", "requirements/constraints-v100.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "requirements.txt").write_text("# comment\npip>=20\n")
    (tmp_path / "requirements/dev.txt").write_text("-r ../requirements.txt\n")
    (tmp_path / "requirements/lock.txt").write_text("pip==25.0 --hash=sha256:00\n")
    executable(tmp_path / "bin/uv", f'#!/bin/sh\n[ "$1" = --version ] || echo "uv $*" >>{tmp_path}/calls\n')
    executable(tmp_path / "bin/java", "#!/bin/sh\n")
    executable(tmp_path / "bin/nvidia-smi", "#!/bin/sh\nexit 9\n")

    def run(*arguments, code=0, **environment):
        (tmp_path / "calls").write_text("")
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", tmp_path / "setup.sh", *arguments],
            cwd="/",
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path, "PYTHON": sys.executable} | environment,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr, (tmp_path / "calls").read_text()

    run.folder = tmp_path
    return run


@pytest.mark.thorough
def test_setup_from_nothing_to_repair(project):
    said, installed = project()
    assert "making .venv" in said and "ready" in said
    assert f"-r {project.folder}/requirements.txt" in installed and "constraints" not in installed
    said, installed = project()
    assert installed == "" and said.count("\n") == 1
    assert "requirements/dev.txt" in project("--dev")[1]
    assert project()[1] == ""
    assert f"-c {project.folder}/requirements/constraints-v100.txt" in project("--v100")[1]
    assert project()[1] == ""  # pinned on a machine with the GPU, used on one without

    # The environment of an interrupted run is not trusted.
    (project.folder / ".venv/.setup-unfinished").touch()
    (project.folder / ".venv/left-over").touch()
    said, installed = project()
    assert "interrupted" in said and installed
    assert not (project.folder / ".venv/left-over").exists()

    # What cannot be installed is named, and the environment that was there stays.
    (project.folder / "requirements.txt").write_text("pip>=20\nno-such-package-here>=1\n")
    executable(project.folder / "bin/uv", '#!/bin/sh\n[ "$1" = --version ]\n')
    said, _ = project(code=1, PIP_NO_INDEX="1")
    assert "still missing: no-such-package-here" in said
    assert (project.folder / ".venv/bin/pip").exists()
    assert "interrupted" not in project(code=1, PIP_NO_INDEX="1")[0]


@pytest.mark.parametrize(
    ("output", "pinned"),
    [
        ("7.0, 580.65.06", True),
        ("9.0, 580.65.06", False),
        ("8.0, 550.54.14", True),
        ("8.0, 580.65.06\n7.0, 580.65.06", True),
        ("17.0, 600.10", False),
    ],
)
def test_setup_pins_torch_where_the_gpu_needs_it(project, output, pinned):
    # A Python that makes no environment: what matters stands in the lines before.
    executable(project.folder / "bin/nvidia-smi", f"#!/bin/sh\nprintf '{output}\\n'\n")
    said, _ = project(code=1, PYTHON="/no/such/python")
    assert ("requirements/constraints-v100.txt applies" in said) is pinned


@pytest.mark.thorough
def test_setup_from_the_lock(project):
    said, installed = project("--locked")
    assert installed.strip().endswith(f"--require-hashes -r {project.folder}/requirements/lock.txt") and "ready" in said
    assert project("--locked")[1] == project()[1] == ""  # what was locked serves every call
    assert "requirements/dev.txt" in project("--dev")[1]
    assert "--require-hashes" in project("--locked")[1]  # after which it is no longer what the lock says
    (project.folder / "requirements/lock.txt").write_text("pip==25.1 --hash=sha256:00\n")
    assert "--require-hashes" in project("--locked")[1]
    assert "--v100" in project("--locked", "--v100", code=1)[0]
    assert "has no test tools" in project("--locked", "--dev", code=1)[0]
    executable(project.folder / "bin/nvidia-smi", "#!/bin/sh\nprintf '7.0, 580.65.06\\n'\n")
    assert "newer GPUs and drivers than this machine's" in project("--locked", code=1)[0]


def test_setup_uses_a_link_and_never_deletes_it(project, tmp_path_factory):
    """An environment that folders share, such as those of git worktrees: another folder's stamp is in it."""
    shared = tmp_path_factory.mktemp("shared") / "venv"
    executable(shared / "bin/python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (shared / ".setup-stamp").write_text("/some/other/folder\n1 2\n")
    (shared / ".setup-unfinished").touch()
    link = project.folder / ".venv"
    link.symlink_to(shared)
    before = sorted(shared.rglob("*"))
    said, installed = project()
    assert "the link .venv points to" in said and "ready" in said and not installed
    (project.folder / "requirements/dev.txt").write_text("-r ../requirements.txt\nno-such-package-here\nnor-this\n")
    said, installed = project("--dev", code=1)
    assert "which lacks no-such-package-here nor-this: install that there" in said and said.count("\n") == 1
    assert link.is_symlink() and sorted(shared.rglob("*")) == before and not installed
    executable(shared / "bin/python", "#!/bin/sh\nexit 1\n")
    said, _ = project(code=1)
    assert f"link to {shared}, where no Python of 3.11" in said and said.count("\n") == 1
    shutil.rmtree(shared)
    assert "rm .venv" in project(code=1)[0] and link.is_symlink()


@pytest.mark.parametrize("quick", [False, True])
def test_the_demo_marks_its_quick_run_and_passes_flags_on(tmp_path, quick):
    shutil.copy(ROOT / "run_demo.sh", tmp_path)
    executable(tmp_path / "setup.sh", "exit 0\n")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    images = "data/demo_quick/images" if quick else "data/demo/images"
    executable(
        python, f'#!/bin/sh\nmkdir -p {images}/SYN0001\n: >{images}/SYN0001/0.png\nprintf "%s\\n" "$*" >>calls\n'
    )
    flags = ["--seed", "3", "--save_dir=elsewhere"]
    done = subprocess.run(
        ["bash", "run_demo.sh", *flags[:1], *(["--quick"] if quick else []), *flags[1:]],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    drawn, mined, trained = (tmp_path / "calls").read_text().splitlines()[-3:]
    assert f"--studies {200 if quick else 2000} " in drawn
    assert "--out elsewhere/hard_negatives.safetensors" in mined
    assert trained.startswith("main_train.py ") and trained.endswith(" --seed 3 --save_dir=elsewhere")
    assert ("a tenth of the data" in trained) == ("run without --quick" in done.stdout.splitlines()[-1]) == quick
    assert "open elsewhere/report.html" in done.stdout and max(map(len, done.stdout.splitlines())) <= 200


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("script", ["run_tests.sh", "run_demo.sh"])
def test_help_sets_nothing_up(tmp_path, script, flag):
    shutil.copy(ROOT / script, tmp_path)
    executable(tmp_path / "setup.sh", f"touch {tmp_path}/was_set_up\nexit 1\n")
    done = subprocess.run(["bash", tmp_path / script, flag], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: bash {script}")
    assert not (tmp_path / "was_set_up").exists()


def test_setup_without_python(project):
    tools = project.folder / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname", "cat", "head", "rm", "grep", "awk", "sed"):
        (tools / tool).symlink_to(shutil.which(tool))
    said, _ = project(code=1, PATH=str(tools), PYTHON="")
    assert "no Python of version 3.11 to 3.14 found (python3 here: none)" in said and "conda" in said
    assert not (project.folder / ".venv").exists()


def test_setup_refuses_unknown_arguments(project):
    assert "unknown argument --develop" in project("--develop", code=2)[0]
    assert "Usage" in project("--help")[0]


def test_slurm_starts_torchrun_on_every_machine(tmp_path):
    # More names than a pipe holds: a reader that stops at the first would end scontrol, and the job, by a broken pipe.
    for name, text in {"scontrol": "seq -f node%g 7 20000", "srun": f'printf "%s\\n" "$@" > {tmp_path}/call'}.items():
        executable(tmp_path / "bin" / name, f"#!/bin/sh\n{text}\n")
    slurm = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "20012",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "PATH": f"{tmp_path}/bin:{os.environ['PATH']}",
    }
    subprocess.run(
        ["bash", ROOT / "scripts" / "slurm_train.sh", "--save_dir", "a b"], check=True, env=os.environ | slurm
    )
    words = (tmp_path / "call").read_text().splitlines()
    options, (script, *flags) = words[: words.index("main_train.py")], words[words.index("main_train.py") :]
    assert script == "main_train.py" and flags == ["--resume", "auto", "--save_dir", "a b"]
    given = {name: options[options.index(name) + 1] for name in options if name.startswith("--") and "=" not in name}
    assert (given["--nnodes"], given["--nproc_per_node"], given["--max_restarts"]) == ("2", "8", "3")
    assert given["--rdzv_endpoint"] == "node7:20012"
