"""The words of the quickstart's task: what can be described, which facts it has, and how a fact is said.

Every value is one word, so that saying a fact means copying that word from the prompt. All words of the task are listed
here; the tokenizer is built from them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """One kind of fact: its values and the ways to say it."""

    values: tuple[str, ...]
    phrases: tuple[str, ...]
    """Predicates with ``{}`` for the value, as in "lives in {}"."""


@dataclass(frozen=True)
class Subject:
    """One kind of thing to describe."""

    instructions: tuple[str, ...]
    """First sentences of a prompt."""
    names: dict[str, str]
    """Name to pronoun."""
    facts: dict[str, Fact]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


WOMEN = _words(
    "Mara Ines Clara Nora Lena Ruth Vera Alma Ida Greta Tessa Zoe Paula Rosa Emma Julia Maya Nina Olga Petra Sara Thea"
)
MEN = _words(
    "Jonas Felix Hugo Oscar Leo Emil Anton Bruno Carl David Erik Frank Georg Henry Ivan Jakob Karl Luis Marco Paul Rafael"
)
CITIES = _words(
    "Lisbon Vienna Oslo Porto Dublin Athens Prague Bergen Turin Seville Krakow Zurich Bremen Ghent Nice Malmo Riga Split "
    "Bath York Basel Lyon"
)

SUBJECTS = {
    "person": Subject(
        instructions=("Introduce this person.", "Write about this person.", "Tell us who this is."),
        names={**dict.fromkeys(WOMEN, "She"), **dict.fromkeys(MEN, "He")},
        facts={
            "job": Fact(
                _words(
                    "baker teacher nurse pilot carpenter lawyer gardener painter plumber barber butcher chemist surgeon "
                    "tailor waiter writer judge farmer banker driver"
                ),
                ("is a {}", "works as a {}"),
            ),
            "city": Fact(CITIES, ("lives in {}", "comes from {}")),
            "hobby": Fact(
                _words(
                    "chess climbing painting sailing gardening running pottery hiking dancing fishing skating surfing "
                    "knitting cycling rowing juggling"
                ),
                ("enjoys {}", "is fond of {}"),
            ),
            "pet": Fact(
                _words("cat dog parrot rabbit hamster turtle pony goldfish canary lizard goat snake ferret mouse"),
                ("has a {}", "keeps a {}"),
            ),
            "language": Fact(
                _words("Spanish Greek Polish Danish Arabic Turkish Finnish Czech Hindi Swedish Korean Dutch"),
                ("speaks {}", "is learning {}"),
            ),
            "food": Fact(
                _words("pasta curry sushi soup salad pizza cheese noodles pancakes tacos lentils rice"),
                ("often cooks {}", "loves to eat {}"),
            ),
        },
    ),
    "restaurant": Subject(
        instructions=("Describe this restaurant.", "Write about this restaurant.", "Recommend this restaurant."),
        names=dict.fromkeys(
            _words(
                "Bluebird Lantern Marigold Anchor Juniper Harvest Saffron Willow Compass Magnolia Orchard Pebble Sparrow "
                "Tamarind Violet Windmill Cedar Falcon Ginger Heron"
            ),
            "It",
        ),
        facts={
            "town": Fact(CITIES, ("is in {}", "stands in {}")),
            "dish": Fact(
                _words("ramen dumplings steak burgers oysters risotto kebabs waffles tapas falafel paella gnocchi"),
                ("serves {}", "is known for {}"),
            ),
            "prices": Fact(_words("low fair moderate high steep modest"), ("has {} prices", "asks {} prices")),
            "mood": Fact(
                _words("quiet lively cosy formal rustic modern festive relaxed romantic noisy"),
                ("has a {} mood", "feels {}"),
            ),
            "chef": Fact((*WOMEN[:10], *MEN[:10]), ("is run by {}", "belongs to {}")),
            "view": Fact(
                _words("river harbour market park castle lake bridge square beach forest"),
                ("looks out on the {}", "is next to the {}"),
            ),
        },
    ),
    "product": Subject(
        instructions=("Describe this product.", "Write about this product.", "Advertise this product."),
        names=dict.fromkeys(
            _words(
                "Zephyr Nimbus Comet Pixel Aurora Quartz Vertex Breeze Cobalt Delta Ember Flux Glider Halo Lumen Matrix "
                "Nova Orbit Prism Rocket"
            ),
            "It",
        ),
        facts={
            "kind": Fact(
                _words(
                    "lamp chair kettle backpack bicycle tent clock radio camera mirror blanket suitcase table drill"
                ),
                ("is a {}", "is sold as a {}"),
            ),
            "colour": Fact(
                _words("red blue green yellow purple black white silver golden pink grey brown"),
                ("comes in {}", "is painted {}"),
            ),
            "material": Fact(
                _words("steel bamboo leather glass cotton plastic copper walnut marble wool rubber paper"),
                ("is made of {}", "contains {}"),
            ),
            "price": Fact(
                _words("nine twelve twenty thirty forty fifty sixty eighty ninety"),
                ("costs {} euros", "sells for {} euros"),
            ),
            "maker": Fact(
                _words("Alcor Bexley Corvus Dorado Elgin Fenix Gallant Hadley Imber Kestrel Lorne Mistral"),
                ("is built by {}", "was designed by {}"),
            ),
            "user": Fact(
                _words("children students travellers cooks musicians campers athletes beginners families seniors"),
                ("is meant for {}", "suits {}"),
            ),
        },
    ),
}
