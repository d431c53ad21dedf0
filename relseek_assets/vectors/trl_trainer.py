"""BiPO on many processes: trl's `DPOTrainer` with one trainable vector and the frozen weights sharded over all ranks.

Here belong the sharding, the dealing of batches to ranks, the steps and their checkpoint. The loss, the order of batches, the signs and the learning
rate are those of `objective.py`, so that the vector is that of `bipo.train` at the same seed. What is launched, and from which files, belongs in
`launched.py`. This is the path for models that no single device holds; where one does, `bipo.py` computes far less (docs/vectors.md).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import distributed
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_utils import TrainOutput
from trl import DPOConfig, DPOTrainer

from relseek_assets.vectors.bipo import Evaluation, TrainedVector
from relseek_assets.vectors.objective import Schedule, TokenPairs, bipo_loss, direction_of, epoch_batches, learning_rate
from relseek_resources.models import SteeredModel, architecture
from relseek_resources.models.steered import by_length
from relseek_resources.storage import content_version, read_tensors, write_tensors

CHECKPOINT, VECTOR = "checkpoint.safetensors", "vector.safetensors"
METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def shard(model: SteeredModel, device: torch.device) -> None:
    """Split the frozen weights over all ranks, one decoder block at a time (FSDP2, full shard), with the values that rank 0 holds.

    The other ranks' model may lie on torch's device `meta`. A device never holds more than its shards and one whole block.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for part in (*model.blocks, model.model):
        _allocate(part, device)
        part.to(device)
        for tensor in (*part.parameters(), *part.buffers()):
            if not isinstance(tensor, DTensor):  # the blocks, once it is the turn of what lies around them
                distributed.broadcast(tensor.data, src=0)
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not model.model)


def _allocate(part: torch.nn.Module, device: torch.device) -> None:
    """Give memory to what lies on `meta`; a weight that two modules share stays shared, which `to_empty` does not see to."""
    known: dict[int, torch.Tensor] = {}
    for module in part.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta:
                    empty = torch.empty_like(tensor, device=device)
                    mine = torch.nn.Parameter(empty, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else empty
                    tensors[name] = known.setdefault(id(tensor), mine)  # type: ignore[assignment]


def passes(rows: Sequence[int], rank: int, ranks: int, at_once: int) -> list[tuple[list[int], bool]]:
    """One rank's forward passes over a batch: pair numbers, and whether they count.

    Sharded weights are gathered by all ranks together, so every rank makes the same number of passes; one that has run out of pairs repeats the
    batch's first and leaves it uncounted.

    Args:
        at_once: the most pairs of a pass; 0 takes the rank's whole share.
    """
    most = -(-len(rows) // ranks)
    at_once = at_once or most
    mine = list(rows[rank::ranks])
    parts = [mine[start : start + at_once] for start in range(0, most, at_once)]
    return [(part, True) if part else ([rows[0]], False) for part in parts]


class BiPOTrainer(DPOTrainer):
    """Trains the vector of one layer; `trained` is then what `bipo.train` returns, on every rank.

    v is no parameter of the model: each rank holds all of it in float32, its gradient is summed over ranks once a step, and so every rank takes the
    same optimiser step and any rank could write the full vector; rank 0 does. `transformers`' own loop is not used: it hands the optimiser to
    accelerate, which looks for its parameters among the sharded ones, and its checkpoint is the whole model.

    Args:
        model: placed or sharded already; `close` gives it back without hook and patch.
        folder: of the checkpoint and of each epoch's vector; read and written by rank 0, read by all, so shared between machines.
        shared: folder of the reference log-probabilities, which do not depend on the layer.
        at_once: pairs in one forward pass of a rank; 0 takes its whole share of a batch.
        checkpoint_activations: recompute the blocks' activations in the backward pass instead of keeping them.
        every: seconds between checkpoints; 0 writes one after every step. Ends of epochs have one anyway.
        report: told the pairs done, reference pass and evaluations included, those of a checkpoint too.
        version: of whatever else decides the result (the weights); a checkpoint of another is not resumed.
    """

    loss_is_scaled_for_ga = True  # `compute_loss` divides by the pairs of the whole batch

    def __init__(
        self,
        model: SteeredModel,
        layer: int,
        training: TokenPairs,
        heldout: TokenPairs,
        schedule: Schedule,
        *,
        seed: int,
        folder: Path,
        shared: Path,
        version: str,
        at_once: int = 0,
        checkpoint_activations: bool = False,
        every: float = 30.0,
        report: Callable[[int], None] = lambda pairs: None,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> None:
        model.check_layer(layer)
        self.steered, self.layer, self.schedule, self.seed = model, layer, schedule, seed
        self.pairs = {"train": training, "eval": heldout}
        self.folder, self.shared, self.at_once, self.every, self.report = folder, shared, at_once, every, report
        tokens = [[pairs.prompts, pairs.replies] for pairs in self.pairs.values()]
        self.reference_version = content_version([version, tokens])
        self.version = content_version([self.reference_version, [pairs.names for pairs in self.pairs.values()], layer, asdict(schedule), seed])
        self.vector = torch.nn.Parameter(torch.zeros(model.width, device=model.device))
        self.vectors: list[np.ndarray] = []
        self.losses: list[float] = []
        self.directions: list[float] = []
        self.evaluations: list[Evaluation] = []
        self._mask, self._direction = torch.zeros(0), 0
        self._sums = torch.zeros(len(METRICS), device=model.device)
        self._saved = time.monotonic()
        self._hook = model.blocks[layer].register_forward_hook(self._add_vector)
        settings = DPOConfig(
            output_dir=str(folder),
            beta=schedule.beta,
            per_device_train_batch_size=schedule.batch_size,
            per_device_eval_batch_size=schedule.batch_size,
            max_length=None,  # pairs that are too long are left out, never truncated
            precompute_ref_log_probs=True,
            gradient_checkpointing=checkpoint_activations,
            bf16=False,  # the weights have the study's dtype already, and v stays in float32
            use_cpu=model.device.type == "cpu",
            num_train_epochs=schedule.epochs,
            seed=seed,
            report_to="none",
            disable_tqdm=True,
        )
        self.adam = torch.optim.AdamW([self.vector], lr=schedule.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=schedule.weight_decay)
        with _nothing_to_hash(model.model):
            super().__init__(
                model=model.model,
                args=settings,
                train_dataset=_dataset(training),
                eval_dataset=_dataset(heldout),
                processing_class=model.tokenizer,
                callbacks=list(callbacks),
                optimizers=(self.adam, None),
            )
        self.remove_callback(PrinterCallback)
        if checkpoint_activations:
            model.model.gradient_checkpointing_enable()

    def close(self) -> None:
        """Give the model back as it was."""
        self._hook.remove()
        self.steered.model.__dict__.pop("forward", None)  # trl's head that scores replies without whole logits
        self.steered.model.gradient_checkpointing_disable()

    # --- what trl and transformers would do otherwise -----------------------------------------------------------------

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = False  # sharded already; else trl loads a second whole model for the reference

    def _send_telemetry(self) -> None:
        """Nothing leaves the machine."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # tokens already, those of `token_pairs`

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """Reference log-probabilities once for all layers and all resumed runs, each rank its share of every batch."""
        path = self.shared / f"reference_{name}.safetensors"
        found = _read(path, self.reference_version)
        if found is None:

            def reference(inputs: dict[str, Any]) -> torch.Tensor:
                return torch.stack(self.compute_ref_log_probs(self.model, inputs), dim=1)

            table = self._over_ranks(dataset, self.pairs[name].lengths, batch_size, reference).cpu().numpy()
            if self.accelerator.is_main_process:
                write_tensors(path, {"log_probs": table}, {"version": self.reference_version})
        else:
            table = found[0]["log_probs"]
            self.report(len(table))
        columns = {"ref_chosen_logps": table[:, 0], "ref_rejected_logps": table[:, 1]}
        return Dataset.from_dict({**dataset.to_dict(), **{column: values.tolist() for column, values in columns.items()}})

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The vector alone, whole, by rank 0."""
        if self.accelerator.is_main_process:
            vector = self.vector.detach().cpu().numpy()
            header = {"layer": str(self.layer), "epoch": str(len(self.vectors)), "version": self.version}
            write_tensors(Path(output_dir or self.folder) / VECTOR, {"vector": vector}, header)

    # --- the objective ------------------------------------------------------------------------------------------------

    def _add_vector(self, _block: torch.nn.Module, _inputs: Any, output: Any) -> Any:
        """d·v on every position that is not padding, nothing at d = 0; its gradient is summed over positions in float32."""
        if self._direction == 0:
            return output
        stream = architecture.stream_of(output)
        steered = self._direction * self.vector * self._mask.unsqueeze(-1)
        return architecture.with_stream(output, stream + steered.to(stream.dtype))

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """Log-probabilities of chosen and rejected replies with the vector off."""
        self._direction = 0
        return super().compute_ref_log_probs(model, inputs)

    def log_ratios(self, model: Any, inputs: dict[str, Any], direction: int) -> torch.Tensor:
        """log π_dv(y|x) - log π_ref(y|x) of chosen and rejected, shape (pairs, 2), in nats."""
        # left in place afterwards: recomputed activations feel the vector too
        self._mask, self._direction = inputs["attention_mask"], direction
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False, labels=labels, fused_lm_head=True)
        chosen, rejected = output.log_probs.sum(dim=1).chunk(2)
        return torch.stack([chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]], dim=1)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> torch.Tensor:
        """This pass's part of the batch's mean loss, at the batch's d; `inputs["share"]` is what one pair weighs in the batch."""
        direction, share = inputs["direction"], inputs["share"]
        ratios = self.log_ratios(model, inputs, direction)
        losses = bipo_loss(ratios, direction, self.schedule.beta)
        rewards = self.schedule.beta * ratios.detach()
        margins = rewards[:, 0] - rewards[:, 1]
        found = (losses.detach(), rewards[:, 0], rewards[:, 1], margins, (direction * margins > 0).float())
        self._sums += share * torch.stack([values.sum() for values in found])
        return share * losses.sum()

    # --- training -----------------------------------------------------------------------------------------------------

    def train(self, *_: Any, **__: Any) -> TrainOutput:
        """All epochs, from the folder's checkpoint where it has one of the same settings; `trained` holds the result."""
        training = self.pairs["train"]
        batches = [epoch_batches(training.names, training.lengths, epoch, self.schedule.batch_size, self.seed) for epoch in self._epochs]
        self.state.max_steps, self.state.num_train_epochs = sum(map(len, batches)), self.schedule.epochs
        self.state.is_world_process_zero = self.accelerator.is_main_process
        self.resume()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        before = 0
        for epoch, epoch_rows in zip(self._epochs, batches, strict=True):
            for number, rows in enumerate(epoch_rows):
                if before + number >= self.state.global_step:
                    self.state.epoch = epoch - 1 + (number + 1) / len(epoch_rows)
                    self._step(rows, epoch, number)
                    self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
                self.report(len(rows))
            before += len(epoch_rows)
            if len(self.vectors) < epoch:
                self.state.epoch = float(epoch)  # also where every step was made before a kill
                self._end(epoch)
            else:
                self.report(2 * len(self.pairs["eval"].names))
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, float(np.mean(self.losses)), {})

    @property
    def trained(self) -> TrainedVector:
        """The epochs done so far, the same on every rank."""
        losses, directions = np.array(self.losses, dtype=np.float32), np.array(self.directions, dtype=np.float32)
        return TrainedVector(np.stack(self.vectors), losses, directions, tuple(self.evaluations))

    @property
    def _epochs(self) -> range:
        return range(1, self.schedule.epochs + 1)

    def _step(self, rows: Sequence[int], epoch: int, number: int) -> None:
        direction = direction_of(self.seed, epoch, number)
        data: Any = self.train_dataset
        self._sums.zero_()
        self.adam.zero_grad()
        for part, counts in self._passes(rows):
            inputs = self.data_collator([data[row] for row in part])
            self.training_step(self.model, {**inputs, "direction": direction, "share": counts / len(rows)})
        assert self.vector.grad is not None
        # one sum over ranks for the gradient and the metrics, so that both are of the whole batch
        summed = self.accelerator.reduce(torch.cat([self.vector.grad, self._sums]), "sum")
        self.vector.grad.copy_(summed[: self.steered.width])
        rate = learning_rate(self.state.global_step, self.state.max_steps, self.schedule)
        for group in self.adam.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_([self.vector], self.schedule.max_grad_norm)
        self.adam.step()
        metrics = dict(zip(METRICS, summed[self.steered.width :].tolist(), strict=True))
        self.losses.append(metrics["loss"])
        self.directions.append(direction)
        self.state.global_step += 1
        self.log({**metrics, "direction": direction, "learning_rate": rate, "grad_norm": norm.item()})
        if time.monotonic() - self._saved >= self.every:
            self.checkpoint()

    def _end(self, epoch: int) -> None:
        self.vectors.append(self.vector.detach().cpu().numpy().copy())
        self.evaluate()
        self.save_model(str(self.folder / f"e{epoch:02d}"))
        self.checkpoint()
        self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Held-out figures at d = +1 and -1 over all ranks, as `bipo.evaluate` defines them; kept in `evaluations` too."""
        lengths = self.pairs["eval"].lengths
        logs: dict[str, float] = {}
        for direction, name in ((1, "add"), (-1, "sub")):

            def ratios_at(inputs: dict[str, Any], direction: int = direction) -> torch.Tensor:
                return self.log_ratios(self.model, inputs, direction)

            ratios = self._over_ranks(self.eval_dataset, lengths, self.schedule.batch_size, ratios_at)
            rewards = self.schedule.beta * ratios
            margins = rewards[:, 0] - rewards[:, 1]
            found = Evaluation(
                epoch=len(self.vectors),
                direction=direction,
                loss=bipo_loss(ratios, direction, self.schedule.beta).mean().item(),
                accuracy=(direction * margins > 0).float().mean().item(),
                margin=margins.mean().item(),
                reward_chosen=rewards[:, 0].mean().item(),
                reward_rejected=rewards[:, 1].mean().item(),
                pairs=len(ratios),
            )
            self.evaluations.append(found)
            logs |= {f"eval_{name}_{key}": value for key, value in asdict(found).items() if key not in ("epoch", "direction", "pairs")}
        self.log(logs)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logs)
        return logs

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _passes(self, rows: Sequence[int]) -> list[tuple[list[int], bool]]:
        return passes(rows, self.accelerator.process_index, self.accelerator.num_processes, self.at_once)

    @torch.no_grad()
    def _over_ranks(
        self, dataset: Dataset, lengths: Sequence[int], batch_size: int, values: Callable[[dict[str, Any]], torch.Tensor]
    ) -> torch.Tensor:
        """`values` of every pair, shape (pairs, 2), the same on all ranks."""
        self.steered.model.eval()
        table = torch.zeros(len(lengths), 2, device=self.vector.device)
        for rows in by_length(lengths, batch_size):
            for part, counts in self._passes(rows):
                found = values(self._prepare_inputs(self.data_collator([dataset[row] for row in part])))
                if counts:
                    table[part] = found.float()
            self.report(len(rows))
        return self.accelerator.reduce(table, "sum")

    # --- checkpoint ---------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """Write vector, optimiser and history as one file, atomically; the place in the data and d follow from the step."""
        self._saved = time.monotonic()
        if not self.accelerator.is_main_process:
            return
        state = self.adam.state[self.vector]
        tensors = {"vector": self.vector.detach(), "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
        arrays |= {"losses": np.array(self.losses), "directions": np.array(self.directions)}
        if self.vectors:
            arrays["vectors"] = np.stack(self.vectors)
        header = {"version": self.version, "evaluations": json.dumps([asdict(found) for found in self.evaluations])}
        write_tensors(self.folder / CHECKPOINT, arrays, header)

    def resume(self) -> None:
        """Go back to the folder's checkpoint; one of other settings is left alone and will be replaced."""
        found = _read(self.folder / CHECKPOINT, self.version)
        if found is None:
            return
        arrays, header = found
        steps = len(arrays["losses"])
        place = self.vector.device
        with torch.no_grad():
            self.vector.copy_(torch.from_numpy(arrays["vector"]))
        self.adam.state[self.vector] = {
            "step": torch.tensor(float(steps)),
            "exp_avg": torch.from_numpy(arrays["exp_avg"]).to(place),
            "exp_avg_sq": torch.from_numpy(arrays["exp_avg_sq"]).to(place),
        }
        self.losses, self.directions = arrays["losses"].tolist(), arrays["directions"].tolist()
        self.vectors = list(arrays.get("vectors", []))
        self.evaluations = [Evaluation(**row) for row in json.loads(header["evaluations"])]
        self.state.global_step = steps


def _read(path: Path, version: str) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """A file of this version, or None; every rank sees the same, because rank 0 writes only after a sum over all ranks."""
    if not path.is_file():
        return None
    arrays, header = read_tensors(path)
    return (arrays, header) if header.get("version") == version else None


def _dataset(pairs: TokenPairs) -> Dataset:
    chosen, rejected = [both[0] for both in pairs.replies], [both[1] for both in pairs.replies]
    return Dataset.from_dict({"prompt_ids": pairs.prompts, "chosen_ids": chosen, "rejected_ids": rejected})


@contextmanager
def _nothing_to_hash(model: Any) -> Iterator[None]:
    """trl hashes every weight to name a cache file that is not used here: minutes at 70B, and impossible once they are sharded."""
    model.state_dict = dict
    try:
        yield
    finally:
        del model.state_dict
