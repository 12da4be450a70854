"""What terms may need besides the batch, made for a model and a set of prompts."""

from cagsr.models.load import LoadedModel
from cagsr.prompts.salience import DocumentFrequency
from cagsr.prompts.stating_words import FLOOR, StatingWords
from cagsr.reward.association import Associations
from cagsr.reward.registry import Resources
from cagsr.scoring.hidden_words import HiddenWords
from cagsr.scoring.stating_tokens import StatingTokensOf
from cagsr.scoring.target_likelihood import TargetLikelihoodOf


def resources_of(
    loaded: LoadedModel, associations: Associations | None, frequency: DocumentFrequency | None, temperature: float
) -> Resources:
    """All of them, as far as they can be; ``temperature`` > 0 divides the logits."""
    return Resources(
        texts=loaded.texts,
        associations=associations,
        hidden_likelihood=HiddenWords(loaded, temperature),
        frequency=frequency,
        stating_tokens=None if frequency is None else StatingTokensOf(loaded, StatingWords(frequency, FLOOR)),
        target_likelihood=TargetLikelihoodOf(loaded, temperature),
    )
