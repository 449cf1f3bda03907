"""The tokens that neurons and directions promote, and directions from a file."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from depass_lightning import Contrast, DePass, LogOdds
from depass_lightning.errors import DePassError
from depass_lightning.logit_lens import layer_scores, next_tokens, notes_on, promoted_tokens
from depass_lightning.prompts import prompts_of
from depass_lightning.sources import Heads, Neurons, Source, Subspace, load_subspace


@pytest.fixture(scope="module")
def depass():
    return DePass.from_pretrained("tiny")


def row_of(depass, word):
    (token,) = depass.tokenizer(word, add_special_tokens=False)["input_ids"]
    return depass.model.get_output_embeddings().weight[token].detach() / depass.model.model.norm.weight


def test_a_direction_promotes_what_the_model_itself_would_say_of_it(depass):
    """Through the model's own norm and unembedding, whose scale changes no order."""
    direction = row_of(depass, " Mary") - row_of(depass, " John")
    ((up, down),) = promoted_tokens(depass, direction[None], count=3)
    with torch.no_grad():
        logits = depass.model.lm_head(depass.model.model.norm(direction))
    top = [depass.tokenizer.decode([i]).strip() for i in logits.topk(3).indices.tolist()]
    assert up == top
    assert (up[0], down[0]) == ("Mary", "John")


def test_neurons_and_single_directions_are_read_and_nothing_else(depass):
    column = depass.model.model.layers[1].mlp.down_proj.weight[:, 7].detach()
    ((up, down),) = promoted_tokens(depass, column[None])
    written = f"promotes {', '.join(up)}; demotes {', '.join(down)}"

    def notes(source: Source) -> dict[str, str]:
        (prompt,) = prompts_of(depass.decoder, depass.tokenizer, "Mary", None, None)
        groups = source.describe(prompt, depass.decoder)
        return notes_on(depass, source, [component for group in groups for component in group])

    assert notes(Neurons(-2, indices=[7])) == {"neuron 7": written}
    assert notes(Neurons(indices=[7]))["layer 1 neuron 7"] == written
    assert notes(Heads()) == {}
    plane = torch.eye(64)[:2]
    assert notes(Subspace(1, [column, plane], names=["a", "b"])) == {"a": written}
    with pytest.raises(DePassError, match="64 numbers"):
        promoted_tokens(depass, torch.ones(2, 3))


PROMPT = "When Mary and John went to the store, John gave a drink to"


@pytest.mark.parametrize("rule", ["half", "softmax"])
def test_tokens_at_every_layer_sum_to_the_logit_lens_and_end_as_the_scores(depass, rule):
    a = depass.attribute(PROMPT, Contrast(" Mary", " John"), rule=rule, temperature=0.3)
    layers = layer_scores(depass, a)
    assert layers is not None
    torch.testing.assert_close(layers[-1], a.scores, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        passed = depass.model(input_ids=torch.tensor([a.token_ids]), output_hidden_states=True)
        # Transformers norms the last of them.
        states = [depass.model.model.norm(state) for state in passed.hidden_states[:-1]]
        logits = torch.stack(
            [depass.model.lm_head(state)[0, -1] for state in [*states, passed.hidden_states[-1]]]
        )
    token, foil = a.target_ids
    torch.testing.assert_close(layers.sum(1), logits[:, token] - logits[:, foil], atol=1e-4, rtol=1e-4)


def test_layers_are_for_the_logits_of_tokens_alone(depass, monkeypatch):
    for options in ({"target": LogOdds(" Mary")}, {"rule": "shap"}, {"source": Heads()}):
        assert layer_scores(depass, depass.attribute(PROMPT, **{"rule": "half", **options})) is None
    answer = depass.attribute(PROMPT, " Mary", rule="half")
    layers = layer_scores(depass, answer)
    assert layers is not None
    assert layers.shape == (len(depass.decoder.blocks) + 1, len(answer.tokens))
    monkeypatch.setattr("depass_lightning.logit_lens.LAYER_BYTES", 15 * 15 * 64 * 4 - 1)
    assert layer_scores(depass, answer) is None


def test_the_likely_next_tokens_are_the_models_at_every_position(depass):
    ids = depass.tokenizer(PROMPT)["input_ids"]
    likely = next_tokens(depass, ids, count=2)
    with torch.no_grad():
        top = depass.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1).topk(2)
    assert [[token["id"] for token in tokens] for tokens in likely] == top.indices.tolist()
    parts = [[token["probability"] for token in tokens] for tokens in likely]
    torch.testing.assert_close(torch.tensor(parts), top.values, atol=1e-5, rtol=1e-4)


def test_subspaces_are_read_from_files(tmp_path):
    save_file({"a": torch.ones(4), "b": torch.eye(4)[:2]}, tmp_path / "two.safetensors")
    two = load_subspace(tmp_path / "two.safetensors", layer=1)
    assert two.names == ["a", "b"]
    assert [tuple(basis.shape) for basis in two.bases] == [(1, 4), (2, 4)]
    np.save(tmp_path / "one.npy", np.eye(4)[:2])
    one = load_subspace(tmp_path / "one.npy", layer=0)
    assert one.names == ["one"]
    assert torch.equal(one.bases[0], torch.eye(4, dtype=torch.float64)[:2])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.npy", None, "there is no file"),
        ("list.txt", b"1 2 3", "neither a .safetensors nor a .npy"),
        ("broken.npy", b"nothing", "broken.npy cannot be read"),
        ("broken.safetensors", b"nothing", "broken.safetensors cannot be read"),
    ],
)
def test_a_file_without_directions_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DePassError, match=message):
        load_subspace(tmp_path / name, layer=0)


def test_directions_that_are_none_are_named(tmp_path):
    save_file({"good": torch.ones(4), "empty": torch.zeros(4)}, tmp_path / "some.safetensors")
    with pytest.raises(DePassError, match=r"some\.safetensors, 'empty'"):
        load_subspace(tmp_path / "some.safetensors", layer=0)
