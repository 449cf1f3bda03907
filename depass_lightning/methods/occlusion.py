"""Occlusion: what the target loses without a token, or without a span of them.

Source: Zeiler & Fergus, "Visualizing and Understanding Convolutional Networks" (ECCV 2014, arXiv 1311.2901);
Li et al., "Understanding Neural Networks through Representation Erasure" (2016, arXiv 1612.08220), for words.
"""

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from depass_lightning.methods.model_runs import Batch
from depass_lightning.methods.token_ablation import AblationBaseline


class Occlusion(AblationBaseline):
    """The target's value less what it is without a token or span, one after another.

    The only token of a prompt cannot be removed: it has the whole value.

    Args:
        depass: the model, with its tokenizer.
        source: `Tokens()` or `Spans(...)`, whose tokens go together.
        how: `remove` takes tokens out of the prompt, which is encoded again and read after its last token;
            `zero` sets their embeddings to zero and keeps all positions.
        rows: the number of ablated prompts in one pass.

    Raises:
        DePassError: `how` is unknown, or there are no rows.
    """

    name: ClassVar[str] = "occlusion"

    @override
    def score(self, batch: Batch) -> Tensor:
        whole, owners = batch.values(), self.owners(batch)
        scores = whole.new_zeros(len(whole), int(owners.max()) + 1)
        places: list[tuple[int, int]] = []
        for row, row_owners in enumerate(owners):
            components = row_owners[row_owners > 0].unique().tolist()
            scores[row, components] = whole[row]
            if self.how == "zero" or len(components) > 1:
                places += [(row, component) for component in components]
        if places:
            rows, components = whole.new_tensor(places).long().unbind(1)
            without = self.values(batch, rows, owners[rows] == components[:, None])
            scores[rows, components] -= without
        return scores[:, None, 1:]
