"""A finished tiny study for the tests of the platform: a random four-block model, forty conversations, two sites, three doses.

It is computed once a test session (once for all workers) and copied for every test that changes it. The tiny study has a copy of a
behaviour folder of its own, so that a test may edit a rubric or a conversation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

CHECKOUT = Path(__file__).parents[2]
BEHAVIOUR = CHECKOUT / "relseek_assets" / "behaviours" / "relationship_seeking"
A_TYPE = 5  # conversations kept of each prompt type: one of them is held out
STUDY = """
name = "tiny"
kind = "bipo"
behaviours = [{behaviour}]
seed = 3

[[models]]
name = "m"
source = {model}
device = "cpu"
layers = [1, 2]
epochs_trained = 3
epochs_evaluated = [2, 3]

[pairs]
training = 12
evaluation = 4
max_tokens = 150

[training]
learning_rate = 0.01
batch_size = 4
warmup_steps = 1

[doses]
generated = [-1.0, 0.0, 1.0]

[prompts]
count = 4
max_words = 60

[sampling]
max_new_tokens = 8

[judge]
bootstrap = 100
"""
ELSEWHERE = ("DAGSTER_HOME", "RELSEEK_STORE", "RELSEEK_RELEASE", "RELSEEK_RELEASE_AXES")


@dataclass(frozen=True)
class Platform:
    """A folder with a study file, its behaviour, and the Dagster home in which it is computed."""

    folder: Path
    model: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def study_file(self) -> Path:
        return self.folder / "tiny.toml"

    @property
    def behaviour(self) -> Path:
        return self.folder / "behaviour"

    @property
    def files(self) -> Path:
        """Where the study's assets lie in the store."""
        return self.home / "store" / "tiny"

    def study_text(self) -> str:
        return STUDY.format(behaviour=json.dumps(str(self.behaviour)), model=json.dumps(str(self.model)))

    def edit(self, old: str, new: str, file: str = "tiny.toml") -> None:
        """Replace the one occurrence of a text in the study file, or in another file of the folder."""
        path = self.folder / file
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{path} holds {old!r} {text.count(old)} times"
        path.write_text(text.replace(old, new), encoding="utf-8")

    def copy(self, folder: Path) -> Platform:
        """All of it in another folder. Files are found through the Dagster home, so nothing but the study file has to change."""
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        copied = Platform(folder, self.model)
        copied.study_file.write_text(copied.study_text())
        return copied

    @contextlib.contextmanager
    def workspace(self, study_file: Path | None = None) -> Iterator[Any]:
        """The study in this process."""
        import dagster as dg

        from relseek_assets.planning import Workspace
        from relseek_assets.stage import Store
        from relseek_assets.study import load_study

        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield Workspace(load_study(str(study_file or self.study_file)), instance, store=Store(root=str(self.home / "store")))

    def command(self, *arguments: object) -> Result:
        """`relseek ARGUMENTS` in this process; the word STUDY stands for the study's file."""
        from relseek_assets.cli import main

        given = [str(self.study_file) if argument == "STUDY" else str(argument) for argument in arguments]
        environment = {**dict.fromkeys(ELSEWHERE), "DAGSTER_HOME": str(self.home)}
        return CliRunner().invoke(main, given, env=environment)

    def environment(self) -> dict[str, str]:
        """What a process of its own needs."""
        kept = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
        paths = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH", ""))))
        return {**kept, "DAGSTER_HOME": str(self.home), "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def process(self, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """`relseek ARGUMENTS` in a process of its own."""
        given = [str(self.study_file) if argument == "STUDY" else str(argument) for argument in arguments]
        return subprocess.run(
            [sys.executable, "-m", "relseek_assets.cli", *given],
            env=self.environment(),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            check=False,
            **options,
        )

    def stored(self) -> dict[str, str]:
        """Every file of the store with the hash of its bytes, temporary ones included."""
        root = self.home / "store"
        return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(root.rglob("*")) if path.is_file()}

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Make sure that the block changes no file of the store and records no event of an asset."""

        def looked() -> tuple[dict[str, str], int]:
            import dagster as dg

            with dg.DagsterInstance.from_config(str(self.home)) as instance:
                return self.stored(), sum(len(instance.fetch_materializations(key, limit=500).records) for key in instance.get_asset_keys())

        before = looked()
        yield
        assert looked() == before


def tiny_model(folder: Path) -> None:
    """A random Llama of four blocks and width 32 with the embedded model's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from relseek_resources.models.loading import converted

    tokenizer = AutoTokenizer.from_pretrained(converted("embedded:smollm2-135m-instruct"))
    settings = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(**settings, num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=1, eos_token_id=tokenizer.eos_token_id)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_behaviour(folder: Path) -> None:
    """The relationship-seeking behaviour with a few conversations of each prompt type."""
    shutil.copytree(BEHAVIOUR, folder)
    file = folder / "conversations.jsonl"
    by_type: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        by_type.setdefault(json.loads(line)["type"], []).append(line)
    file.write_text("".join(f"{line}\n" for lines in by_type.values() for line in lines[:A_TYPE]), encoding="utf-8")


def _session_folder(factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a session."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


def _once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let the first worker fill `folder`, and the others wait for it."""
    finished = folder.with_name(f"{folder.name}.finished")
    with FileLock(f"{folder}.lock"):
        if not finished.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            finished.touch()
    return folder


def _new(platform: Platform) -> Platform:
    """A tiny study of which nothing is computed."""
    platform.home.mkdir(parents=True)
    shutil.copy(CHECKOUT / "dagster_home" / "dagster.yaml", platform.home)
    small_behaviour(platform.behaviour)
    platform.study_file.write_text(platform.study_text())
    return platform


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _once(_session_folder(tmp_path_factory) / "tiny-model", tiny_model)


@pytest.fixture(scope="session")
def judged_session(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Platform:
    """A tiny study whose judges are fitted and whose vectors are not trained. Copy it before changing anything."""

    def make(folder: Path) -> None:
        names = ("conversation_lengths", "judge_calibration", "coherence_calibration", "judge_quality")
        done = _new(Platform(folder, tiny_model_folder)).process("run", "STUDY", *(part for name in names for part in ("--select", name)))
        assert done.returncode == 0, done.stdout + done.stderr

    return Platform(_once(_session_folder(tmp_path_factory) / "judged", make), tiny_model_folder)


@pytest.fixture(scope="session")
def finished_session(tmp_path_factory: pytest.TempPathFactory, judged_session: Platform) -> Platform:
    """The finished tiny study. Read it, or copy it before changing anything."""

    def make(folder: Path) -> None:
        done = judged_session.copy(folder).process("run", "STUDY")
        assert done.returncode == 0, done.stdout + done.stderr

    return Platform(_once(_session_folder(tmp_path_factory) / "finished", make), judged_session.model)


@pytest.fixture
def finished(finished_session: Platform, tmp_path: Path) -> Platform:
    """A finished tiny study of the test's own."""
    return finished_session.copy(tmp_path / "platform")


@pytest.fixture
def judged(judged_session: Platform, tmp_path: Path) -> Platform:
    """A tiny study of the test's own whose judges are fitted and whose vectors are not trained."""
    return judged_session.copy(tmp_path / "platform")


@pytest.fixture
def blank(tiny_model_folder: Path, tmp_path: Path) -> Platform:
    """A tiny study of the test's own of which nothing is computed."""
    return _new(Platform(tmp_path / "platform", tiny_model_folder))


@pytest.fixture(autouse=True)
def _nothing_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ELSEWHERE:
        monkeypatch.delenv(name, raising=False)
