"""`relseek steer` answers lines under the strengths that were set, says what it did, and lives through lines that it cannot carry out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

from relseek_assets.cli import main
from relseek_assets.steer import Session, Strengths, converse, layer_range, obey, of_file, said
from relseek_resources.models import Add, Ceiling, Floor, Sampling
from relseek_resources.storage import write_tensors
from relseek_resources.vector_files import VectorFileError
from tests.resources.test_vector_files import BAD

VECTOR = 3 * np.random.default_rng(0).normal(size=64).astype(np.float32)
GREEDY = Sampling(temperature=0, max_new_tokens=8)


def session(model: Any, **strengths: float) -> Session:
    return Session(model, {1: VECTOR, 2: VECTOR}, 2, Strengths(**strengths), GREEDY)


def heard(found: Session, *lines: str) -> tuple[str, list[str]]:
    """What a conversation writes, and what it notes beside."""
    written: list[str] = []
    notes: list[str] = []
    converse(found, lines, written.append, notes.append)
    return "".join(written), notes


def reply_under(model: Any, interventions: list, *turns: str, system: str = "") -> str:
    """The last reply of a conversation whose turns are user, assistant, user, ..."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]
    with model.intervene(interventions):
        return model.generate([[*opening, *messages]], GREEDY, seeds=[0])[0].text


def scaled(scale: float) -> list:
    return [Add(VECTOR, 1, scale), Add(VECTOR, 2, scale)]


# --- the session ------------------------------------------------------------------------------------------------------


def test_a_line_is_answered_under_the_scale_and_with_what_was_said_before(tiny_llama):
    found = session(tiny_llama, scale=2.0)
    written, notes = heard(found, "Hello", "And now?")
    first = reply_under(tiny_llama, scaled(2.0), "Hello")
    second = reply_under(tiny_llama, scaled(2.0), "Hello", first, "And now?")
    assert written == f"{first}\n{second}\n"
    assert first != reply_under(tiny_llama, [], "Hello")
    assert len(notes) == 2 and all("scale 2" in note for note in notes)


def test_a_number_behind_bars_is_the_strength_of_that_turn_alone(tiny_llama):
    found = session(tiny_llama, scale=0.0)
    written, _ = heard(found, "Hello || -2.5", "And now?")
    first = reply_under(tiny_llama, scaled(-2.5), "Hello")
    assert written == f"{first}\n{reply_under(tiny_llama, [], 'Hello', first, 'And now?')}\n"
    assert [turn["scale"] for turn in found.turns] == [-2.5, 0.0]


@pytest.mark.parametrize(("name", "kind"), [("floor", Floor), ("cap", Ceiling)])
def test_where_only_a_bound_is_set_the_number_behind_bars_is_that_bound(tiny_llama, name, kind):
    found = session(tiny_llama, **{name: 0.0})
    written, _ = heard(found, "Hello || 40")
    assert written == reply_under(tiny_llama, [kind(VECTOR, 1, 40.0), kind(VECTOR, 2, 40.0)], "Hello") + "\n"
    assert found.turns[0][name] == 40.0 and found.turns[0]["scale"] is None and getattr(found.strengths, name) == 0.0


def test_scale_floor_and_cap_work_together_in_that_order_at_each_block(tiny_llama):
    found = session(tiny_llama, scale=4.0, floor=-2.0, cap=3.0)
    by_hand = [one for layer in (1, 2) for one in (Add(VECTOR, layer, 4.0), Floor(VECTOR, layer, -2.0), Ceiling(VECTOR, layer, 3.0))]
    assert heard(found, "Hello")[0] == reply_under(tiny_llama, by_hand, "Hello") + "\n"
    assert found.turns[0]["projection"] <= 3.0 + 1e-3


def test_the_figures_are_the_projection_as_it_was_made_the_tokens_and_the_time(tiny_llama):
    found = session(tiny_llama, scale=2.0)
    _, (note,) = heard(found, "Hello")
    reply = found.turns[0]["reply"]
    with tiny_llama.intervene(scaled(2.0)):
        (expected,) = tiny_llama.projections([[{"role": "user", "content": "Hello"}]], VECTOR, [2], [reply])[0]
    assert found.turns[0]["projection"] == pytest.approx(float(expected), abs=1e-4)
    assert note.startswith(f"[projection {expected:.3f} after block 2; {found.turns[0]['tokens']} tokens in ")
    assert found.turns[0]["seconds"] > 0


def test_commands_change_what_follows(tiny_llama):
    found = session(tiny_llama, scale=2.0)
    written, notes = heard(found, "/scale -1", "/system Be brief.", "Hello", "/reset", "/scale off", "Hello", "/quit", "never said")
    steered = reply_under(tiny_llama, scaled(-1.0), "Hello", system="Be brief.")
    assert written == f"{steered}\n{reply_under(tiny_llama, [], 'Hello', system='Be brief.')}\n"
    assert notes[0] == "scale -1" and "system prompt: Be brief." in notes and "no intervention" in notes
    assert len(found.turns) == 2


def test_a_line_that_cannot_be_carried_out_is_explained_and_the_conversation_goes_on(tiny_llama):
    found = session(tiny_llama, scale=1.0)
    written, notes = heard(found, "/scale much", "/louder", "Hello || x", "|| 2", "/save", "", "Hello")
    assert "/scale needs a finite number and got 'much'" in notes[0]
    assert "no command /louder" in notes[1] and "/reset" in notes[1]
    assert "|| needs a finite number and got 'x'" in notes[2]
    assert "nothing stands before ||" in notes[3]
    assert "/save FILE" in notes[4]
    assert written == reply_under(tiny_llama, scaled(1.0), "Hello") + "\n" and len(found.history) == 2


def test_a_strength_that_breaks_the_model_ends_no_conversation(tiny_llama):
    found = session(tiny_llama, scale=1.0)
    written, notes = heard(found, "Hello || 1e38", "Hello")
    assert "not finite" in notes[0]
    assert written == reply_under(tiny_llama, scaled(1.0), "Hello") + "\n", "what failed is not part of the history"


def test_saved_turns_say_everything(tiny_llama, tmp_path):
    found = session(tiny_llama, scale=1.0)
    heard(found, "Hello || 2", "/system Be kind.", "Ho", f"/save {tmp_path / 'turns.jsonl'}")
    first, second = (json.loads(line) for line in (tmp_path / "turns.jsonl").read_text().splitlines())
    assert (first["user"], first["scale"], first["system"]) == ("Hello", 2.0, "") and second["system"] == "Be kind."
    assert {"reply", "projection", "tokens", "seconds", "seed", "floor", "cap", "layer"} <= first.keys()


def test_a_reply_that_is_broken_off_counts_as_far_as_it_went(tiny_llama):
    found, pieces = session(tiny_llama, scale=0.0), []

    def interrupted(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            raise KeyboardInterrupt

    reply = found.say("Hello", None, interrupted)
    assert reply == "".join(pieces) and reply_under(tiny_llama, [], "Hello").startswith(reply)
    assert found.history[-1] == {"role": "assistant", "content": reply} and len(pieces) == 3


@pytest.mark.parametrize(("line", "expected"), [("a", ("a", None)), ("a || 1.5", ("a", 1.5)), ("a || b || -2", ("a || b", -2.0)), ("||0", ("", 0.0))])
def test_the_last_bars_part_the_text_from_its_strength(line, expected):
    assert said(line) == expected


def test_layers_are_written_as_ranges_or_one_by_one():
    assert layer_range("12-14") == [12, 13, 14] and layer_range("3, 7,7") == [3, 7] and layer_range("5") == [5]


def test_help_is_a_command_too(tiny_llama):
    assert "/save FILE" in obey(session(tiny_llama), "/help")


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, random_causal_lm: Any, byte_tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_causal_lm("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def steer(*arguments: object, lines: str = "Hello\n", environment: dict[str, str] | None = None) -> Result:
    options = ("--temperature", "0", "--max-tokens", "8", "--device", "cpu")
    return CliRunner().invoke(main, ["steer", *map(str, arguments), *options], input=lines, env=environment)


def test_lines_of_a_pipe_are_answered_on_the_standard_output_and_all_else_on_the_error(tiny_llama, model_folder, tmp_path):
    torch.save(torch.from_numpy(VECTOR), tmp_path / "vector.pt")
    done = steer("--model", model_folder, "--vector", tmp_path / "vector.pt", "--layer", 1, "--scale", 2, lines="Hello\nHello || 0\n")
    assert done.exit_code == 0, done.output
    first = reply_under(tiny_llama, [Add(VECTOR, 1, 2.0)], "Hello")
    assert done.stdout == f"{first}\n{reply_under(tiny_llama, [], 'Hello', first, 'Hello')}\n"
    assert "tokens in" in done.stderr and "scale 2" in done.stderr and "after block 1" in done.stderr


def test_layers_put_the_vector_after_each_of_them(tiny_llama, model_folder, tmp_path):
    write_tensors(tmp_path / "all.safetensors", {str(layer): VECTOR + layer for layer in range(4)}, {})
    done = steer("--model", model_folder, "--vector", tmp_path / "all.safetensors", "--layers", "1-2", "--floor", 20)
    assert done.exit_code == 0, done.output
    assert done.stdout == reply_under(tiny_llama, [Floor(VECTOR + 1, 1, 20.0), Floor(VECTOR + 2, 2, 20.0)], "Hello") + "\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a STUDY, or give --model SOURCE"),
        (("quickstart", "--model", "x"), "name a STUDY, or give --model"),
        (("--model", "x"), "--model needs --vector"),
        (("quickstart", "--layer", "3"), "--vector and --layer go with --model"),
        (("quickstart", "--layers", "9-3"), "give blocks as 12-20"),
        (("kwickstart",), "did you mean 'quickstart'"),
    ],
)
def test_what_cannot_be_steered_is_refused_with_a_remedy(arguments, message):
    done = steer(*arguments)
    assert done.exit_code != 0 and message in " ".join(done.output.replace("│", " ").split())


def test_a_vector_that_does_not_fit_is_refused_before_anything_is_said(model_folder, tmp_path):
    torch.save(torch.ones(63), tmp_path / "short.pt")
    done = steer("--model", model_folder, "--vector", tmp_path / "short.pt", "--layer", 1, "--scale", 1)
    assert done.exit_code == 1 and "shape (63,)" in done.output and done.stdout == ""
    torch.save(torch.ones(64), tmp_path / "deep.pt")
    beyond = steer("--model", model_folder, "--vector", tmp_path / "deep.pt", "--layer", 4, "--scale", 1)
    assert beyond.exit_code == 1 and "blocks 0 to 3" in beyond.output


def test_a_file_that_gives_its_block_steers_that_one_alone(tiny_llama, model_folder, tmp_path):
    file = tmp_path / "vector.safetensors"
    write_tensors(file, {"vector": VECTOR}, {"site": "m:L02"})
    done = steer("--model", model_folder, "--vector", file, "--scale", 2)
    assert done.exit_code == 0, done.output
    assert done.stdout == reply_under(tiny_llama, [Add(VECTOR, 2, 2.0)], "Hello") + "\n"
    elsewhere = steer("--model", model_folder, "--vector", file, "--layer", 1, "--scale", 2)
    assert elsewhere.exit_code == 1 and "it steers block 2 and not block 1" in elsewhere.output


@pytest.mark.parametrize("fault", sorted(BAD.keys() - {"a matrix"}))
def test_what_is_no_vector_is_refused_as_everywhere(tmp_path, fault):
    make, told = BAD[fault]
    path = make(tmp_path)
    with pytest.raises(VectorFileError) as caught:
        of_file("embedded:none", path, [1])
    assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)


def home_of(folder: Path) -> dict[str, str]:
    (folder / "dagster.yaml").write_text("")
    return {"DAGSTER_HOME": str(folder), "RELSEEK_STORE": str(folder / "store")}


def test_a_studys_last_vector_is_taken_from_its_store(tiny_llama, model_folder, tmp_path):
    study = tmp_path / "mine.toml"
    study.write_text(
        f'name = "mine"\nkind = "bipo"\nbehaviours = ["relationship_seeking"]\n[[models]]\nname = "m"\nsource = {json.dumps(str(model_folder))}\n'
        "layers = [1]\nepochs_trained = 2\nepochs_evaluated = [2]\n[doses]\ngenerated = [-1.0, 1.0]\n"
    )
    environment = home_of(tmp_path)
    missing = steer(study, "--scale", 1, environment=environment)
    assert missing.exit_code == 1 and "relseek run mine --select steering_vectors" in missing.output
    for epoch, factor in ((1, 1.0), (2, -2.0)):
        write_tensors(tmp_path / "store" / "mine" / "steering_vectors" / "m:L01" / f"e{epoch:02d}.safetensors", {"vector": factor * VECTOR}, {})
    for options, vector in (((), -2 * VECTOR), (("--epoch", 1), VECTOR)):
        done = steer(study, "--scale", 1.5, *options, environment=environment)
        assert done.exit_code == 0, done.output
        assert done.stdout == reply_under(tiny_llama, [Add(vector, 1, 1.5)], "Hello") + "\n"
    unknown = steer(study, "--site", "m:L09", environment=environment)
    assert unknown.exit_code == 1 and "there is m:L01" in unknown.output


def test_a_contrastive_studys_directions_are_each_blocks_own(tiny_llama, model_folder, tmp_path):
    study = tmp_path / "axes.toml"
    study.write_text(
        f'name = "axes"\nkind = "contrastive"\npersonas = "assistant"\n[[models]]\nname = "m"\nsource = {json.dumps(str(model_folder))}\n'
    )
    environment = home_of(tmp_path)
    directions = np.random.default_rng(1).normal(size=(4, 64)).astype(np.float32)
    file = tmp_path / "store" / "axes" / "directions" / "m.safetensors"
    write_tensors(file, {"response_mean": directions, "last_token": -directions}, {})
    done = steer(study, "--layers", "1-2", "--floor", 9, environment=environment)
    assert done.exit_code == 0, done.output
    assert done.stdout == reply_under(tiny_llama, [Floor(directions[layer], layer, 9.0) for layer in (1, 2)], "Hello") + "\n"
    other = steer(study, "--site", "m:L03", "--extraction", "last_token", "--scale", 30, environment=environment)
    assert other.stdout == reply_under(tiny_llama, [Add(-directions[3], 3, 30.0)], "Hello") + "\n"
    unmeasured = steer(study, "--scale", 1, environment=environment)
    assert unmeasured.exit_code == 1 and "direction_quality" in unmeasured.output and "--site" in unmeasured.output
