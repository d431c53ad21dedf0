"""A capped model answers like one whose projections are clamped by plain hooks, wherever its directions come from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from relseek_resources.models import CappedModel, Floor, ModelError, SteeredModel, format_prompt, read_capping, read_directions
from relseek_resources.models.capped import PUBLISHED
from relseek_resources.storage import StorageError, write_tensors
from relseek_resources.vector_files import VectorFileError
from tests.resources.test_vector_files import BAD, control, safetensors

PROMPT = "Why is the sky blue at noon?"
STEPS = 10
needs_axes = pytest.mark.skipif(
    "RELSEEK_RELEASE_AXES" not in os.environ, reason="RELSEEK_RELEASE_AXES is not set: the published directions are not here"
)


def random_directions(layers: range = range(4), width: int = 64) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {layer: torch.randn(width, generator=generator) for layer in layers}


@contextmanager
def clamped(model: SteeredModel, directions: dict[int, torch.Tensor], low: float = -np.inf, high: float = np.inf) -> Iterator[None]:
    """Plain hooks that replace each token's coordinate along its direction by its clamped self, in float64."""

    def hook(direction: torch.Tensor):
        unit = direction.double() / direction.double().norm()

        def clamp(_module, _inputs, output):
            stream = output.double()
            coordinate = stream @ unit
            return (stream + (coordinate.clamp(low, high) - coordinate).unsqueeze(-1) * unit).to(output.dtype)

        return clamp

    handles = [model.model.model.layers[layer].register_forward_hook(hook(direction)) for layer, direction in directions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def naive_greedy(model: SteeredModel, prompt: list[int], steps: int = STEPS) -> list[int]:
    """Whole forwards without a cache, the likeliest token each time, until the end of the turn."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + steps and model.tokenizer.eos_token_id not in tokens[len(prompt) :]:
        tokens.append(int(model.model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens


def text_of(model: SteeredModel, tokens: list[int]) -> str:
    return model.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def prompt_of(model: SteeredModel) -> list[int]:
    """The prompt's bytes after the beginning-of-text token, counted by hand: six special tokens come before the alphabet."""
    begin = model.tokenizer.bos_token_id
    return [begin, *model.tokenizer.convert_tokens_to_ids(list(PROMPT.replace(" ", "Ġ")))]


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "bounds"), [("floor", {"low": 100.0}), ("ceiling", {"high": -100.0})])
def test_a_capped_reply_is_the_greedy_one_of_a_model_with_clamped_projections(tiny, side, bounds):
    directions = random_directions()
    capped = CappedModel(tiny, directions, layers=[1, 2], threshold=100.0 if side == "floor" else -100.0, side=side)
    with clamped(tiny, {layer: directions[layer] for layer in (1, 2)}, **bounds):
        expected = text_of(tiny, naive_greedy(tiny, prompt_of(tiny)))
    assert capped.generate(PROMPT, max_new_tokens=STEPS) == expected
    assert capped.generate_uncapped(PROMPT, max_new_tokens=STEPS) == text_of(tiny, naive_greedy(tiny, prompt_of(tiny))) != expected


def test_the_text_begins_with_the_prompt_as_published_and_special_tokens_are_kept(tiny_llama):
    capped = CappedModel(tiny_llama, random_directions(), threshold=-1e6)
    text = capped.generate(PROMPT, STEPS)
    assert text.startswith("<begin>" + PROMPT) and len(text) > len("<begin>" + PROMPT)
    assert capped.generate("<begin>" + PROMPT, STEPS) == text, "a prompt that has its beginning gets no second one"


def test_a_conversation_is_asked_in_the_models_own_template(tiny_llama):
    capped = CappedModel(tiny_llama, random_directions(), threshold=5.0)
    conversation = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = capped.generate(conversation, STEPS)
    assert text.startswith("<begin><system>Be brief.<end><user>Hi<end><assistant>")
    assert text == capped.generate("<begin><system>Be brief.<end><user>Hi<end><assistant>", STEPS)


def test_a_reply_that_ends_keeps_its_end_token_and_stops_there(random_causal_lm, byte_tokenizer):
    model, directions = SteeredModel(random_causal_lm("llama"), byte_tokenizer), random_directions()
    with clamped(model, directions, low=5.0):
        tokens = naive_greedy(model, prompt_of(model))
    start = len(prompt_of(model))
    last = next(place for place in range(start + 2, len(tokens)) if tokens[place] not in tokens[start:place])
    model.model.generation_config.eos_token_id = tokens[last]
    capped = CappedModel(SteeredModel(model.model, byte_tokenizer), directions, threshold=5.0)
    assert capped.generate(PROMPT, STEPS) == text_of(model, tokens[: last + 1])


def test_a_sampled_reply_is_drawn_from_its_seed(tiny_llama):
    capped = CappedModel(tiny_llama, random_directions(), threshold=3.0)
    drawn = [capped.generate(PROMPT, STEPS, do_sample=True, seed=seed) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    assert capped.generate_uncapped(PROMPT, STEPS, do_sample=True, seed=1) != drawn[0]


def test_a_floor_below_every_projection_answers_like_the_uncapped_model(tiny):
    capped = CappedModel(tiny, random_directions(), threshold=-1e6)
    assert capped.generate(PROMPT, STEPS) == capped.generate_uncapped(PROMPT, STEPS)


def test_capping_the_opposite_directions_at_the_ceiling_is_the_same_cap(tiny_llama):
    directions = random_directions()
    floor = CappedModel(tiny_llama, directions, threshold=5.0)
    ceiling = CappedModel(tiny_llama, {layer: -direction for layer, direction in directions.items()}, threshold=-5.0, side="ceiling")
    assert floor.generate(PROMPT, STEPS) == ceiling.generate(PROMPT, STEPS) != floor.generate_uncapped(PROMPT, STEPS)


def test_each_layer_has_its_own_threshold_where_they_are_given_one_a_layer(tiny_llama):
    directions, limits = random_directions(), np.array([2.0, 9.0])
    capped = CappedModel(tiny_llama, directions, [3, 1], threshold=limits)
    conversation = [[{"role": "user", "content": PROMPT}]]
    with tiny_llama.intervene(capped.interventions):
        found = [tiny_llama.projections(conversation, directions[layer], [layer])[0, 0] for layer in (3, 1)]
    plain = [tiny_llama.projections(conversation, directions[layer], [layer])[0, 0] for layer in (3, 1)]
    assert plain[1] < 9.0 and found[1] == pytest.approx(9.0, abs=1e-4)
    assert found[0] > 2.0 - 1e-4


def test_steering_outside_a_cap_comes_first_and_the_cap_has_the_last_word(tiny_llama):
    direction = random_directions()[1]
    capped = CappedModel(tiny_llama, {1: direction}, threshold=4.0)
    with tiny_llama.steer(direction, 1, -3.0):
        steered_then_capped = capped.generate(PROMPT, STEPS)
        steered = capped.generate_uncapped(PROMPT, STEPS)
    with tiny_llama.intervene(Floor(direction, 1, 4.0)), tiny_llama.steer(direction, 1, -3.0):
        capped_then_steered = capped.generate_uncapped(PROMPT, STEPS)
    assert len({steered_then_capped, steered, capped_then_steered}) == 3
    pushed = {1: direction}
    handle = tiny_llama.model.model.layers[1].register_forward_hook(lambda _module, _inputs, output: output - 3.0 * direction)
    with clamped(tiny_llama, pushed, low=4.0):
        expected = text_of(tiny_llama, naive_greedy(tiny_llama, prompt_of(tiny_llama)))
    handle.remove()
    assert steered_then_capped == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": [1, 7]}, r"no direction for the layers \[7\]"),
        ({"layers": []}, "no direction"),
        ({"threshold": [1.0, 2.0]}, "2 thresholds for 4 layers"),
        ({"threshold": np.inf}, "threshold must be a finite number"),
        ({"side": "top"}, "side 'top'.*ceiling.*floor"),
        ({"directions": {9: torch.ones(64)}}, "layer 9: the model has the blocks 0 to 3"),
        ({"directions": {1: torch.ones(63)}}, r"shape \(63,\)"),
        ({"directions": {1: torch.zeros(64)}}, "vector is zero"),
    ],
)
def test_a_cap_that_does_not_fit_the_model_is_refused_when_it_is_made(tiny_llama, settings, message):
    with pytest.raises(ModelError, match=message):
        CappedModel(tiny_llama, **{"directions": random_directions(), "threshold": 1.0, **settings})


# --- chat formats -----------------------------------------------------------------------------------------------------


def test_prompts_have_the_chat_formats_of_their_model_families():
    chatml = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {you}<|im_end|>\n<|im_start|>assistant\n"
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    llama = f"{header.format('system')}Be brief.<|eot_id|>{header.format('user')}Hi {{you}}<|eot_id|>{header.format('assistant')}"
    assert format_prompt("Be brief.", "Hi {you}") == format_prompt(system="Be brief.", query="Hi {you}", model_type="qwen") == chatml
    assert CappedModel.format_prompt("Be brief.", "Hi {you}", "llama") == llama
    with pytest.raises(ModelError, match="no chat format 'gemma'.*conversation"):
        format_prompt("Be brief.", "Hi", "gemma")


# --- where directions come from ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, random_causal_lm, byte_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_causal_lm("llama").save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def expected_reply(model: SteeredModel, directions: dict[int, torch.Tensor], low: float) -> str:
    with clamped(model, directions, low=low):
        return text_of(model, naive_greedy(model, prompt_of(model)))


@pytest.mark.parametrize("form", ["pt by layer", "pt array", "safetensors by layer", "safetensors array"])
def test_a_local_folder_and_a_file_of_directions_make_a_capped_model(tmp_path, tiny_llama, model_folder, form):
    directions = random_directions()
    stacked = torch.stack([directions[layer] for layer in range(4)])
    match form:
        case "pt by layer":
            torch.save(directions, file := tmp_path / "directions.pt")
        case "pt array":
            torch.save(stacked, file := tmp_path / "axis.pt")
        case "safetensors by layer":
            write_tensors(file := tmp_path / "d.safetensors", {str(layer): vector.numpy() for layer, vector in directions.items()}, {})
        case "safetensors array":
            write_tensors(file := tmp_path / "d.safetensors", {"directions": stacked.numpy()}, {})
    capped = CappedModel.from_model_key(str(model_folder), directions=file, layers=[1, 2], threshold=6.0, device="cpu")
    expected = expected_reply(tiny_llama, {layer: directions[layer] for layer in (1, 2)}, low=6.0)
    assert capped.generate(PROMPT, STEPS) == expected != capped.generate_uncapped(PROMPT, STEPS)


def test_bfloat16_directions_come_back_as_their_float32_values(tmp_path):
    vector = torch.randn(64).to(torch.bfloat16)
    torch.save({3: vector}, tmp_path / "d.pt")
    found = read_directions(tmp_path / "d.pt")
    assert list(found) == [3] and found[3].dtype == np.float32
    np.testing.assert_array_equal(found[3], vector.float().numpy())


def test_one_vector_serves_the_layer_that_its_file_gives_and_otherwise_the_layers_that_are_asked_for(tmp_path):
    vector = np.arange(1, 65, dtype=np.float32)
    write_tensors(tmp_path / "site.safetensors", {"vector": vector}, {"site": "m:L02"})
    torch.save(torch.from_numpy(vector), tmp_path / "bare.pt")
    assert list(read_directions(tmp_path / "site.safetensors")) == list(read_directions(tmp_path / "site.safetensors", [2])) == [2]
    with pytest.raises(VectorFileError, match=r"site\.safetensors: it steers block 2 and not block 3"):
        read_directions(tmp_path / "site.safetensors", [2, 3])
    assert list(read_directions(tmp_path / "bare.pt", [0, 3])) == [0, 3]
    np.testing.assert_array_equal(read_directions(tmp_path / "bare.pt", [1])[1], vector)
    with pytest.raises(ModelError, match="bare.pt: it holds one vector.*layers="):
        read_directions(tmp_path / "bare.pt")


def test_directions_are_read_in_every_precision_and_from_control_vectors(tmp_path):
    half = safetensors(vector=torch.tensor([0.5, -2.0], dtype=torch.bfloat16))(tmp_path)
    np.testing.assert_array_equal(read_directions(half, [1])[1], np.array([0.5, -2.0], np.float32))
    gguf = control({"direction.3": np.array([0.5, -2.0], np.float32)})(tmp_path)
    assert list(read_directions(gguf)) == [3]
    np.testing.assert_array_equal(read_directions(gguf, [3])[3], np.array([0.5, -2.0], np.float32))


@pytest.mark.parametrize("fault", sorted(BAD.keys() - {"a matrix"}))
def test_what_is_no_vector_is_refused_by_name(tmp_path, fault):
    make, told = BAD[fault]
    path = make(tmp_path)
    with pytest.raises(VectorFileError) as caught:
        read_directions(path, [1])
    assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)


class Trap:
    """Unpickled without care, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_code_in_a_direction_file_is_refused_and_does_not_run(tmp_path):
    torch.save({0: Trap(tmp_path / "sprung")}, tmp_path / "trap.pt")
    with pytest.raises(VectorFileError, match="trap.pt: not a readable file of plain tensors"):
        read_directions(tmp_path / "trap.pt")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("given", [{}, {"directions": {1: torch.ones(64)}}, {"threshold": 3.0}])
def test_a_key_without_published_settings_needs_directions_and_a_threshold(given):
    with pytest.raises(ModelError, match="model key 'gwen'.*llama.*qwen.*directions=.*threshold="):
        CappedModel.from_model_key("gwen", **given)


def test_without_the_published_files_a_key_says_which_variable_to_set(monkeypatch):
    monkeypatch.delenv("RELSEEK_RELEASE_AXES", raising=False)
    with pytest.raises(ModelError, match="'qwen'.*RELSEEK_RELEASE_AXES.*directions="):
        CappedModel.from_model_key()


@needs_axes
@pytest.mark.parametrize(("key", "blocks", "width", "first", "last", "threshold"), [("qwen", 36, 2048, 5, 29, 3.0), ("llama", 28, 3072, 9, 19, 2.0)])
def test_a_published_key_caps_the_published_layers_at_the_published_floor(
    tmp_path, random_causal_lm, byte_tokenizer, key, blocks, width, first, last, threshold
):
    # A random model of the published shape; the defaults are those of section 11.1 of the specification.
    family = {"qwen": "qwen2", "llama": "llama"}[key]
    model = random_causal_lm(family, hidden_size=width, num_hidden_layers=blocks, intermediate_size=8, num_attention_heads=2, head_dim=16)
    model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    capped = CappedModel.from_model_key(key, source=str(tmp_path), device="cpu")
    assert capped.layers == tuple(range(first, last + 1)) and PUBLISHED[key].source.endswith("3B-Instruct")
    published = torch.load(Path(os.environ["RELSEEK_RELEASE_AXES"]) / f"artifacts/directions/{key}_last_token.pt", weights_only=True)
    assert len(published) == blocks
    conversation, layers = [[{"role": "user", "content": PROMPT}]], list(capped.layers)
    directions = torch.stack([published[layer].float() for layer in layers])
    before = capped.model.projections(conversation, directions, layers)
    with capped.model.intervene(capped.interventions):
        after = capped.model.projections(conversation, directions, layers)
    assert (before < threshold - 0.1).any() and after.min() > threshold - 1e-3
    assert after.min() == pytest.approx(threshold, abs=1e-3)


# --- from a study's store ---------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path, model_folder) -> Path:
    """A store with one site's vectors after two epochs, laid out as the study `tiny` writes them."""
    for epoch in (1, 2):
        vector = epoch * random_directions()[2].numpy() + (epoch - 1) * random_directions()[3].numpy()
        header = {"site": "m:L02", "epoch": str(epoch), "source": "trained", "model": str(model_folder)}
        write_tensors(tmp_path / f"tiny/steering_vectors/m:L02/e{epoch:02d}.safetensors", {"vector": vector}, header)
    return tmp_path


def test_a_studys_last_vector_caps_the_model_that_it_names_after_its_own_layer(store, tiny_llama):
    last = 2 * random_directions()[2] + random_directions()[3]
    capped = CappedModel.from_study(store / "tiny", "m:L02", side="floor", threshold=6.0, device="cpu")
    assert capped.generate(PROMPT, STEPS) == expected_reply(tiny_llama, {2: last}, low=6.0) != capped.generate_uncapped(PROMPT, STEPS)


def test_an_earlier_epoch_other_layers_and_a_loaded_model_may_be_named(store, tiny_llama, monkeypatch):
    monkeypatch.setenv("RELSEEK_STORE", str(store))
    first = random_directions()[2]
    capped = CappedModel.from_study("tiny", "m:L02", 1, side="ceiling", threshold=-6.0, layers=[1, 3], model=tiny_llama)
    assert capped.model is tiny_llama and capped.layers == (1, 3)
    with clamped(tiny_llama, {1: first, 3: first}, high=-6.0):
        expected = text_of(tiny_llama, naive_greedy(tiny_llama, prompt_of(tiny_llama)))
    assert capped.generate(PROMPT, STEPS) == expected


@pytest.mark.parametrize(
    ("site", "epoch", "message"),
    [("m:L03", None, "m:L03: no stored vector"), ("m:L02", 7, r"e07.safetensors: no such epoch; there is \['e01', 'e02'\]")],
)
def test_a_vector_that_the_study_has_not_stored_is_refused_by_path(store, site, epoch, message):
    with pytest.raises(ModelError, match=message):
        CappedModel.from_study(store / "tiny", site, epoch, side="floor", threshold=1.0)


def test_a_stored_vector_without_a_model_in_its_header_asks_for_one(store):
    write_tensors(store / "tiny/steering_vectors/m:L02/e03.safetensors", {"vector": np.ones(64)}, {"site": "m:L02"})
    with pytest.raises(ModelError, match="names no model; give model="):
        CappedModel.from_study(store / "tiny", "m:L02", side="floor", threshold=1.0)


def test_a_studys_name_is_looked_up_in_the_store_of_the_commands(store, tiny_llama, tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    (home / "store").mkdir(parents=True)
    (store / "tiny").rename(home / "store" / "tiny")
    elsewhere.joinpath("tiny").mkdir(parents=True)  # a folder of that name where the caller happens to stand
    monkeypatch.chdir(elsewhere)
    monkeypatch.delenv("RELSEEK_STORE", raising=False)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    with pytest.raises(StorageError, match="home: no dagster.yaml.*RELSEEK_STORE"):
        CappedModel.from_study("tiny", "m:L02", side="floor", threshold=6.0, model=tiny_llama)
    (home / "dagster.yaml").write_text("")
    assert CappedModel.from_study("tiny", "m:L02", side="floor", threshold=6.0, model=tiny_llama).layers == (2,)


def test_a_derived_vector_caps_as_a_trained_one_does(store, tiny_llama, model_folder):
    vector, header = 3 * random_directions()[3], {"site": "m-without_other:L02", "model": str(model_folder)}
    write_tensors(store / "tiny/derived_vectors/m-without_other:L02/e02.safetensors", {"vector": vector.numpy()}, header)
    capped = CappedModel.from_study(store / "tiny", "m-without_other:L02", side="floor", threshold=6.0, device="cpu")
    assert capped.generate(PROMPT, STEPS) == expected_reply(tiny_llama, {2: vector}, low=6.0) != capped.generate_uncapped(PROMPT, STEPS)


@pytest.fixture
def axes(tmp_path, model_folder) -> Path:
    """A contrastive study's folder with its directions, laid out as the asset writes them."""
    units = torch.stack(list(random_directions().values()))
    arrays = {"response_mean": units, "last_token": -units, "response_mean_length": units.norm(dim=1)}
    write_tensors(tmp_path / "axes/directions/m.safetensors", {name: found.numpy() for name, found in arrays.items()}, {"model": str(model_folder)})
    return tmp_path / "axes"


def test_a_contrastive_studys_directions_cap_each_block_along_its_own(axes, tiny_llama, monkeypatch):
    monkeypatch.setenv("RELSEEK_STORE", str(axes.parent))
    capped = CappedModel.from_study("axes", "m", side="floor", threshold=6.0, layers=range(1, 3), device="cpu")
    own = {layer: random_directions()[layer] for layer in (1, 2)}
    assert capped.generate(PROMPT, STEPS) == expected_reply(tiny_llama, own, low=6.0) != capped.generate_uncapped(PROMPT, STEPS)
    one = CappedModel.from_study("axes", "m:L03", side="floor", threshold=6.0, extraction="last_token", model=tiny_llama)
    assert one.generate(PROMPT, STEPS) == expected_reply(tiny_llama, {3: -random_directions()[3]}, low=6.0)


@pytest.mark.parametrize(
    ("site", "settings", "message"),
    [
        ("m", {}, "m.safetensors: the site 'm' names no layer; give.*m:L12, or layers="),
        ("m:L01", {"extraction": "response_mean_length"}, "no directions 'response_mean_length'; there is last_token, response_mean$"),
        ("m:L04", {}, r"no direction for the layers \[4\]; there are the blocks 0 to 3"),
        ("m:L01", {"epoch": 2}, "directions have no epoch 2"),
        ("n:L01", {}, "n:L01: no stored vector, and there are no directions of the model"),
    ],
)
def test_directions_that_are_not_there_are_refused_by_file(axes, tiny_llama, site, settings, message):
    with pytest.raises(ModelError, match=message):
        CappedModel.from_study(axes, site, side="floor", threshold=1.0, model=tiny_llama, **settings)


def test_a_trained_vector_has_no_extraction(store, tiny_llama):
    with pytest.raises(ModelError, match="a vector has no extraction 'last_token'"):
        CappedModel.from_study(store / "tiny", "m:L02", side="floor", threshold=1.0, extraction="last_token", model=tiny_llama)


# --- capping configurations -------------------------------------------------------------------------------------------

UNWANTED = {"contr_0": (1, torch.randn(64, generator=torch.Generator().manual_seed(3))), "contr_1": (2, 7 * random_directions()[2])}
EXPERIMENTS = [
    {"id": "layers_1:3-p0.25", "interventions": [{"vector": "contr_0", "cap": -5.0}, {"vector": "contr_1", "cap": 2}]},
    {"id": "layers_2:3-p0.01", "interventions": [{"vector": "contr_1", "cap": -40.5}]},
]


def capping_file(folder: Path, form: str, experiments: list | None = None) -> Path:
    """The same configuration in each of the three formats."""
    file, experiments = folder / f"capping.{form}", EXPERIMENTS if experiments is None else experiments
    if form == "safetensors":
        header = {"layers": json.dumps({name: layer for name, (layer, _) in UNWANTED.items()}), "experiments": json.dumps(experiments)}
        write_tensors(file, {name: vector.numpy() for name, (_, vector) in UNWANTED.items()}, header)
        return file
    as_stored = (lambda vector: vector.tolist()) if form == "json" else (lambda vector: vector.double())
    content = {
        "vectors": {name: {"layer": layer, "vector": as_stored(vector)} for name, (layer, vector) in UNWANTED.items()},
        "experiments": experiments,
    }
    if form == "json":
        file.write_text(json.dumps(content))
    else:
        torch.save(content, file)
    return file


@pytest.mark.parametrize("form", ["pt", "json", "safetensors"])
def test_a_capping_configuration_is_read_as_ceilings_that_hold_the_projections_down(tiny_llama, tmp_path, form):
    found = read_capping(capping_file(tmp_path, form))
    assert list(found) == ["layers_1:3-p0.25", "layers_2:3-p0.01"]
    directions, caps = dict(UNWANTED.values()), {1: -5.0, 2: 2.0}
    prompt = torch.tensor([prompt_of(tiny_llama)])
    with torch.no_grad():
        plain = tiny_llama.model(input_ids=prompt).logits
        with tiny_llama.intervene(found["layers_1:3-p0.25"]):
            capped = tiny_llama.model(input_ids=prompt).logits
        with clamped(tiny_llama, {1: directions[1]}, high=caps[1]), clamped(tiny_llama, {2: directions[2]}, high=caps[2]):
            expected = tiny_llama.model(input_ids=prompt).logits
    torch.testing.assert_close(capped, expected, atol=1e-4, rtol=0)
    assert (capped - plain).abs().max() > 0.01


def test_code_in_a_capping_file_is_refused_and_not_run(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    torch.save({"vectors": {}, "experiments": Harmful()}, tmp_path / "capping.pt")
    with pytest.raises(VectorFileError, match="plain tensors"):
        read_capping(tmp_path / "capping.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("experiments", "message"),
    [
        ([{"id": "a", "interventions": [{"vector": "contr_9", "cap": 1.0}]}], r"experiment 1 \(a\).*'contr_9' is not there.*contr_0"),
        ([{"id": "a", "interventions": [{"vector": "contr_0", "floor": 1.0}]}], "experiment 1.*number `cap`"),
        ([{"id": "a", "interventions": [{"vector": "contr_0", "cap": "high"}]}], "number `cap`"),
        ([{"id": "a", "interventions": []}, {"id": "a", "interventions": []}], "experiment 2.*'a' is there already"),
        ([{"interventions": []}], "experiment 1: expected `id`"),
        ({"id": "a"}, "a list of `experiments`"),
    ],
)
def test_a_faulty_capping_configuration_is_refused_by_its_place(tmp_path, experiments, message):
    with pytest.raises(ModelError, match=message):
        read_capping(capping_file(tmp_path, "json", experiments))


def test_what_is_no_capping_configuration_is_refused(tmp_path):
    (tmp_path / "broken.json").write_text('{"vectors": {')
    (tmp_path / "list.json").write_text("[1, 2]")
    write_tensors(tmp_path / "bare.safetensors", {"contr_0": np.ones(4)}, {})
    for name, message in (
        ("broken.json", "not valid JSON"),
        ("list.json", "found list"),
        ("bare.safetensors", "a layer for each of"),
        ("none.json", "cannot be read"),
    ):
        with pytest.raises(ModelError, match=message):
            read_capping(tmp_path / name)
    with pytest.raises(VectorFileError, match="none.pt: no such file"):
        read_capping(tmp_path / "none.pt")


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (torch.ones(64, dtype=torch.int64), "has the type int64"),
        (torch.full((64,), torch.nan), "64 NaN or infinite values"),
        (torch.ones(2, 64), r"has the shape \(2, 64\)"),
    ],
)
def test_a_capping_vector_that_is_none_is_refused_by_its_name(tmp_path, vector, message):
    experiments = [{"id": "a", "interventions": [{"vector": "contr_0", "cap": 1.0}]}]
    torch.save({"vectors": {"contr_0": {"layer": 1, "vector": vector}}, "experiments": experiments}, tmp_path / "capping.pt")
    with pytest.raises(VectorFileError, match=f"capping.pt, experiment 1 .a.: the vector 'contr_0' .*{message}"):
        read_capping(tmp_path / "capping.pt")


def test_a_capping_configuration_in_bfloat16_is_read(tmp_path):
    header = {"layers": '{"contr_0": 1}', "experiments": '[{"id": "a", "interventions": [{"vector": "contr_0", "cap": 1.0}]}]'}
    save_file({"contr_0": torch.tensor([0.5, -2.0], dtype=torch.bfloat16)}, tmp_path / "capping.safetensors", metadata=header)
    (ceiling,) = read_capping(tmp_path / "capping.safetensors")["a"]
    np.testing.assert_array_equal(np.asarray(ceiling.vector), np.array([0.5, -2.0], np.float32))
