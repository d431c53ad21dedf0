"""Reads the published data release in its own layout; what is not there is `Absent`, never an error of its own.

Here belongs knowledge of the release's paths and rows. What is made of them belongs to the stages.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import pandas as pd
import pyarrow as pa
import pyarrow.json

from relseek_resources.storage import StorageError, file_sha256, read_jsonl

RESCORED = "5-frontier-model-behavioral-landscaping/data/scored_vector_generations_ep10.jsonl"
PROMPTED = "2-steering-vector-training/prompting_experiments/exp1_steerability"
TEST_PAIRS = "data/relationship-seeking/test.jsonl"
VECTORS = "2-steering-vector-training/vector"
TRAINING_METRICS = "evaluation_metrics.jsonl"
VECTOR_EVALS = "2-steering-vector-training/vector_evals"
RATING_JUDGE = "gpt-4o-2024-08-06"  # who gave the scores and choices under VECTOR_EVALS (spec/pipeline.md, sections 4.1 and 4.2)
RESCORING_JUDGE = "gpt-4.1-mini"  # who scored replies again with the rubric of the frontier panel (section 8)


class Absent(StorageError):
    """A file of the release that is not on this machine."""


@dataclass(frozen=True)
class ScoredReply:
    """A published reply with the score that a published judge gave it."""

    text: str
    score: float


@dataclass(frozen=True)
class PublishedEvaluation:
    """A published held-out evaluation of one epoch (spec/pipeline.md, section 2.4).

    `loss` is the mean over the whole test set; rewards, margin, accuracy and log-probs are means over the share of rank 0 alone. `accuracy` is as it
    was published, the share of pairs with a greater reward for the chosen reply, whatever the direction: at d = -1 a perfect vector has 0.
    """

    epoch: int
    direction: int
    loss: float
    accuracy: float
    margin: float
    reward_chosen: float
    reward_rejected: float
    log_prob_chosen: float
    log_prob_rejected: float


@dataclass(frozen=True)
class Release:
    """The release's root folder, or None where RELSEEK_RELEASE is not set."""

    root: Path | None
    variable: ClassVar[str] = "RELSEEK_RELEASE"

    @classmethod
    def from_environment(cls) -> Self:
        configured = os.environ.get(cls.variable)
        return cls(Path(configured) if configured else None)

    def file(self, name: str) -> Path:
        """The path of a file of the release.

        Raises:
            Absent: the variable is not set, or the file is not there.
        """
        if self.root is None:
            raise Absent(f"absent: {name} ({self.variable} is not set)")
        path = self.root / name
        if not path.is_file():
            raise Absent(f"absent: {path}")
        return path

    def version(self, names: tuple[str, ...]) -> str:
        """A data version of several files, counting those that are absent."""
        digest = hashlib.sha256()
        for name in names:
            try:
                digest.update(f"{name}={file_sha256(self.file(name))}".encode())
            except Absent:
                digest.update(f"{name}=absent".encode())
        return digest.hexdigest()[:16]

    def rescored_generations(self) -> list[ScoredReply]:
        """Steered replies of the published vector with their GPT-4.1-mini scores; unscored rows are left out."""
        rows = [row for _, row in read_jsonl(self.file(RESCORED))]
        return [ScoredReply(row["response_str"], float(row["relationship_score"])) for row in rows if row["relationship_score"] is not None]

    def prompted_generations(self) -> list[ScoredReply]:
        """Prompted replies of experiment 1 with their GPT-4o relationship scores, every model that is there."""
        if self.root is None or not (self.root / PROMPTED).is_dir():
            raise Absent(f"absent: {PROMPTED}")
        found = []
        for folder in sorted((self.root / PROMPTED).iterdir()):
            generations, scores = folder / "generations.jsonl", folder / "relationship_scores.jsonl"
            if generations.is_file() and scores.is_file():
                texts = {row["generation_id"]: row["response_str"] for _, row in read_jsonl(generations)}
                found += [
                    ScoredReply(texts[row["generation_id"]], float(row["score"])) for _, row in read_jsonl(scores) if row["generation_id"] in texts
                ]
        if not found:
            raise Absent(f"absent: generations with scores under {self.root / PROMPTED}")
        return found

    def test_replies(self) -> list[tuple[str, str, str]]:
        """(conversation, chosen reply, rejected reply) of the published test split."""
        rows = [row for _, row in read_jsonl(self.file(TEST_PAIRS))]
        return [(str(row["prompt_id"]), row["chosen_arr"][0]["content"], row["rejected_arr"][0]["content"]) for row in rows]

    # --- vectors ------------------------------------------------------------------------------------------------------

    def vector_files(self, behaviour: str, model: str, layer: int) -> dict[int, list[Path]]:
        """Epoch -> the files of one layer's vector, one for each rank of the training that wrote one; empty where the release has none.

        Args:
            behaviour, model: as the release spells them, `relationship-seeking` and `Llama-3.1-70B-Instruct`.
        """
        found: dict[int, list[Path]] = {}
        folder = None if self.root is None else self.root / _vector_folder(behaviour, model, layer)
        for path in sorted(folder.glob(f"vec_ep*_layer{layer}_gpu*.pt")) if folder is not None else ():
            name = re.fullmatch(rf"vec_ep(\d+)_layer{layer}_gpu\d+\.pt", path.name)
            if name is not None:
                found.setdefault(int(name[1]), []).append(path)
        return found

    def training_evaluations(self, behaviour: str, model: str, layer: int) -> list[PublishedEvaluation]:
        """The published held-out evaluations of one layer, by epoch and direction.

        Raises:
            Absent: RELSEEK_RELEASE is not set, or the file is not there.
            StorageError: naming the file and the line that cannot be read.
        """
        path = self.file(training_metrics_file(behaviour, model, layer))
        return [_evaluation(row, f"{path}, line {number}") for number, row in read_jsonl(path)]

    # --- judgements of the sweep --------------------------------------------------------------------------------------

    def rating_files(self, model: str, layer: int, epoch: int) -> dict[str, Path]:
        """Rubric -> the file of one vector's ratings on it, `{rubric}_scores_ep{E}.jsonl`; empty where the release has none.

        Args:
            model: as the release spells it, `Llama-3.1-70B-Instruct`.
        """
        found = self._evaluations(model, layer, epoch, "_scores")
        return {name: path for name, path in found.items() if not name.startswith(("raw_", "pairwise_"))}

    def comparison_files(self, model: str, layer: int, epoch: int) -> dict[str, Path]:
        """Rubric -> the file of one vector's pairwise comparisons on it, `pairwise_{rubric}_scores_ep{E}.jsonl`."""
        found = self._evaluations(model, layer, epoch, "_scores")
        return {name.removeprefix("pairwise_"): path for name, path in found.items() if name.startswith("pairwise_")}

    def reply_file(self, model: str, layer: int, epoch: int) -> Path | None:
        """The file of one vector's replies at every dose: its sweep, or the part of it that was scored again, whichever is here."""
        sweep = self._evaluations(model, layer, epoch, "").get("generations")
        return sweep or self.rescored_file(model, layer, epoch)

    def rescored_file(self, model: str, layer: int, epoch: int) -> Path | None:
        """The file of one vector's replies that were scored again, `scored_vector_generations_ep{E}.jsonl`; its first row says of which vector."""
        path = None if self.root is None else self.root / Path(RESCORED).parent / f"scored_vector_generations_ep{epoch}.jsonl"
        if path is None or not path.is_file():
            return None
        try:
            _, row = next(read_jsonl(path), (0, {}))
        except StorageError:
            return path  # whoever reads it is told what is wrong with it
        return path if (row.get("model_name"), row.get("layer")) == (model, layer) else None

    def prompts(self) -> dict[str, list[dict[str, str]]]:
        """Item -> the messages before the reply, of the published test split.

        Raises:
            Absent: RELSEEK_RELEASE is not set, or the file is not there.
        """
        return {str(row["prompt_id"]): row["prompt_arr"] for _, row in read_jsonl(self.file(TEST_PAIRS))}

    def _evaluations(self, model: str, layer: int, epoch: int, end: str) -> dict[str, Path]:
        folder = None if self.root is None else self.root / VECTOR_EVALS / model / f"layer{layer}"
        tail = f"{end}_ep{epoch}.jsonl"
        return {} if folder is None else {path.name.removesuffix(tail): path for path in sorted(folder.glob(f"*{tail}"))}


PAID = (("prompt_tokens", pa.int64()), ("completion_tokens", pa.int64()))
JUDGED = (("token_usage", pa.struct(PAID)), ("cost", pa.struct([("total_cost", pa.float64())])))
RATING = (("test_prompt_id", pa.int64()), ("multiplier", pa.float64()), ("score", pa.float64()), *JUDGED)
COMPARISON = (
    ("test_prompt_id", pa.int64()),
    ("multiplier_a", pa.float64()),
    ("multiplier_b", pa.float64()),
    ("model_response", pa.string()),
    *JUDGED,
)
REPLY = (
    ("test_prompt_id", pa.int64()),
    ("model_name", pa.string()),
    ("layer", pa.int64()),
    ("epoch", pa.int64()),
    ("multiplier", pa.float64()),
    ("response_str", pa.string()),
    ("response_tokens", pa.list_(pa.int64())),
    *((name, pa.float64()) for name in ("avg_log_prob", "perplexity", "chosen_logprob", "rejected_logprob", "propensity")),
)
RESCORE = (("relationship_score", pa.float64()),)


def read_ratings(path: Path) -> pd.DataFrame:
    """One row a rating, in the order of the file: item, multiplier, score, prompt_tokens, completion_tokens, total_cost.

    `total_cost` is the published one: the list price in USD, without the half that a batch costs less (spec/pipeline.md, section 4.1).

    Raises:
        StorageError: naming the file and the field or line that cannot be read.
    """
    return _judgements(path, RATING)


def read_comparisons(path: Path) -> pd.DataFrame:
    """One row a comparison: item, multiplier_a (of the reply shown first), multiplier_b, model_response, and tokens and cost as in `read_ratings`."""
    return _judgements(path, COMPARISON)


def read_replies(path: Path, model: str, layer: int, epoch: int) -> pd.DataFrame:
    """One row a reply: item, multiplier, response_str, response_tokens, avg_log_prob, perplexity, chosen_logprob, rejected_logprob, propensity.

    Raises:
        StorageError: as of `read_ratings`, and where a row is of another vector.
    """
    return _replies(path, REPLY, model, layer, epoch)


def reply_doses(path: Path) -> frozenset[float]:
    """The doses of a file of replies."""
    return frozenset(_columns(path, (("multiplier", pa.float64()),), optional=())["multiplier"].unique().to_pylist())


def read_rescores(path: Path, model: str, layer: int, epoch: int) -> pd.DataFrame:
    """The rows of `read_replies` with `relationship_score`, NaN where the published judge gave none."""
    return _replies(path, REPLY + RESCORE, model, layer, epoch)


def _judgements(path: Path, fields: tuple[tuple[str, pa.DataType], ...]) -> pd.DataFrame:
    table = _columns(path, fields, optional=("token_usage", "cost")).flatten()
    names = {"token_usage.prompt_tokens": "prompt_tokens", "token_usage.completion_tokens": "completion_tokens", "cost.total_cost": "total_cost"}
    frame = _items(table.rename_columns([names.get(name, name) for name in table.column_names]))
    keys = [name for name in frame.columns if name == "item" or name.startswith("multiplier")]
    again = frame.loc[frame.duplicated(keys), keys]
    if len(again):
        item, *doses = again.iloc[0][["item", *(key for key in keys if key != "item")]]
        raise StorageError(f"{path}: item {item} is judged more than once at {', '.join(map(str, doses))}; keep one row of each")
    return frame


def _replies(path: Path, fields: tuple[tuple[str, pa.DataType], ...], model: str, layer: int, epoch: int) -> pd.DataFrame:
    frame = _items(_columns(path, fields, optional=("relationship_score",)))
    others = frame[(frame["model_name"] != model) | (frame["layer"] != layer) | (frame["epoch"] != epoch)]
    if len(others):
        raise StorageError(
            f"{path}: {len(others)} rows are not of {model}, layer {layer}, epoch {epoch}, as its place or first row says; part the file"
        )
    return frame.drop(columns=["model_name", "layer", "epoch"])


def _items(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas()
    return frame.assign(item=frame["test_prompt_id"].astype(str)).drop(columns="test_prompt_id")


def _columns(path: Path, fields: tuple[tuple[str, pa.DataType], ...], optional: tuple[str, ...]) -> pa.Table:
    """Fields of a JSON Lines file as columns; a field that is lacking or null in a row is refused unless it is optional."""
    options = pyarrow.json.ParseOptions(explicit_schema=pa.schema(fields), unexpected_field_behavior="ignore")
    try:
        table = pyarrow.json.read_json(path, read_options=pyarrow.json.ReadOptions(use_threads=False), parse_options=options)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        for _ in read_jsonl(path):  # names the line where it is no object
            pass
        raise StorageError(f"{path}: {error}; mend or remove the row") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
    for name, _ in fields:
        if table[name].null_count and name not in optional:
            row = table[name].is_null().to_pylist().index(True) + 1
            raise StorageError(f"{path}, row {row}: {name} is missing; mend or remove the row")
    return table


def training_metrics_file(behaviour: str, model: str, layer: int) -> str:
    return f"{_vector_folder(behaviour, model, layer)}/{TRAINING_METRICS}"


def _vector_folder(behaviour: str, model: str, layer: int) -> str:
    return f"{VECTORS}/{behaviour}_{model}/layer{layer}"


def _evaluation(row: dict[str, Any], where: str) -> PublishedEvaluation:
    try:
        direction = int(row["eval_multiplier"])
        side = {1: "add", -1: "sub"}[direction]
        return PublishedEvaluation(
            epoch=int(row["epoch"]),
            direction=direction,
            loss=float(row[f"eval_test_dataset_{side}_loss"]),
            accuracy=float(row["eval_rewards/accuracies"]),
            margin=float(row["eval_rewards/margins"]),
            reward_chosen=float(row["eval_rewards/chosen"]),
            reward_rejected=float(row["eval_rewards/rejected"]),
            log_prob_chosen=float(row["eval_logps/chosen"]),
            log_prob_rejected=float(row["eval_logps/rejected"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{where}: no published evaluation ({error!r}); mend or remove the line") from error
