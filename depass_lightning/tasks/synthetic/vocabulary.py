"""The names, places and objects of generated prompts.

With its leading space, every name is a single token of common English vocabularies (checked for SmolLM2).
"""


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text that lists them."""
    return tuple(text.split())


def pairs(text: str) -> dict[str, str]:
    """Return the pairs that a text lists, such as "France:Paris Germany:Berlin"."""
    return dict(pair.split(":") for pair in text.split())


NAMES = words(
    """
    Mary John James Michael Robert David William Richard Joseph Thomas Charles Daniel Matthew Anthony Mark
    Paul Steven Andrew Kenneth George Joshua Kevin Brian Edward Ronald Timothy Jason Jeffrey Ryan Jacob Gary
    Nicholas Eric Jonathan Stephen Larry Justin Scott Benjamin Samuel Frank Gregory Raymond Alexander
    Patrick Jack Dennis Jerry Tyler Aaron Henry Adam Douglas Nathan Peter Walter Harold Arthur Albert
    Vincent Patricia Jennifer Linda Elizabeth Barbara Susan Jessica Sarah Karen Lisa Nancy Betty Sandra
    Margaret Ashley Emily Michelle Carol Amanda Melissa Deborah Stephanie Rebecca Sharon Laura Dorothy Amy
    Kathleen Angela Shirley Emma Nicole Anna Samantha Katherine Christine Helen Rachel Janet Maria Catherine
    Heather Diane Olivia Julie Joyce Victoria Ruth Kelly Christina Joan Judith Andrea Hannah Martha Teresa
    Alice Julia Charlotte Sophia
    """
)

PLACES = words(
    """
    store park school office station garden market library beach restaurant museum hospital house airport
    bank church farm gym lake mall river theater zoo hotel bar club bridge harbor village castle factory
    forest kitchen mountain studio stadium temple tower university pool
    """
)

OBJECTS = words(
    """
    drink book ring ball pen card letter cup flower ticket phone bag hat coin gift key map snack picture
    bottle box basket computer watch necklace cake coat knife lamp paper camera chair rose bell shirt kite
    toy candle pencil hammer
    """
)
