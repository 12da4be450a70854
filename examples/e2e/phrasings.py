"""What the slot checker knows of language: names, and the phrasings of each value."""

from __future__ import annotations

NAMES = (
    "Alimentum",
    "Aromi",
    "Bibimbap House",
    "Blue Spice",
    "Browns Cambridge",
    "Clowns",
    "Cocum",
    "Cotto",
    "Fitzbillies",
    "Giraffe",
    "Green Man",
    "Loch Fyne",
    "Midsummer House",
    "Strada",
    "Taste of Cambridge",
    "The Cambridge Blue",
    "The Cricketers",
    "The Dumpling Tree",
    "The Eagle",
    "The Golden Curry",
    "The Golden Palace",
    "The Mill",
    "The Olive Grove",
    "The Phoenix",
    "The Plough",
    "The Punter",
    "The Rice Boat",
    "The Twenty Two",
    "The Vaults",
    "The Waterman",
    "The Wrestlers",
    "Travellers Rest Beefeater",
    "Wildwood",
    "Zizzi",
)
"""Every restaurant of E2E NLG."""

NEARS = (
    "All Bar One",
    "Avalon",
    "Burger King",
    "Café Adriatic",
    "Café Brazil",
    "Café Rouge",
    "Café Sicilia",
    "Clare Hall",
    "Crowne Plaza Hotel",
    "Express by Holiday Inn",
    "Rainbow Vegetarian Café",
    "Raja Indian Cuisine",
    "Ranch",
    "The Bakers",
    "The Portland Arms",
    "The Six Bells",
    "The Sorrento",
    "Yippee Noodle Bar",
)
"""Every landmark of E2E NLG."""

_RATED = r"(?:rat(?:ed|ing|ings|es?)\b|reviews?\b|reviewed|scores?\b|stars?\b|feedback|recommended)"
_PRICED = r"(?:pric\w*|costs?\b|costing|cost\b)"
_OTHER = (
    r"(?!(?:and\b|but\b|with\b|high|low|average|moderate|good|poor|great|bad|mid|cheap|excellent|pric|cost|rat|expensive"
    r"|recommend|reasonabl|affordabl|fair)\w*)"
)
_FEW = rf"(?:[- ]{_OTHER}[\w']+){{0,3}}?[- ]"
"""Up to three words between an adjective and its noun, none of which begins another statement."""
_NOUN = r"(?:[- ](?:range|rangers?|tag|point|level|bracket|category|scale|menu|food)s?)?"
_LINK = (
    r"is|are|was|were|be|been|being|as|of|at|it|them|in|on|by|a|an|the|very|quite|rather|just|also|only|fairly|pretty|"
    r"has|have|side|end|range|towards?|remains?|considered|customers?"
)
_IS = rf"{_NOUN}(?:[:,]? (?:{_LINK})\b)*[ :]+"
"""What stands between a noun and what is said of it: "price range is very ..."."""

MEANINGS: dict[str, dict[str, str]] = {
    "eatType": {
        "coffee shop": r"coffee|\bcaf[eé]s?\b|cafeteria",
        "pub": r"\bpubs?\b",
        "restaurant": r"\brestaur\w+",
    },
    "food": {
        "Chinese": r"\bchinese?\b|\bchina\b",
        "English": r"\benglish\b|\bbritish(?! pound)|\bengland\b|fish (?:and|&|n) chips",
        "Fast food": r"\bfast[- ]?foods?\b|burgers?\b|\bfries\b",
        "French": r"\bfrench\b|\bfrance\b",
        "Indian": r"\bindian?\b",
        "Italian": r"\bital\w+|\bpastas?\b",
        "Japanese": r"\bjapan\w*|\bsushi\b",
    },
    "priceRange": {
        "cheap": rf"(?<!not )(?<!n't )\bcheap\w*|inexpensive|\blow(?:er|est)?(?:er)?{_FEW}{_PRICED}|{_PRICED}{_IS}(?:low|cheap)\w*"
        rf"|(?:less|lower|cheaper) th[ae]n (?:£ ?|pounds? )?20\b|(?:under|below|up to|within|<) ?(?:£ ?|pounds? )?20\b"
        r"|£ ?20 (?:or|and) (?:less|under|below)",
        "affordable": rf"\baffordabl\w+|\breasonabl\w+(?!{_FEW}{_RATED})|\b(?:great|good|decent){_FEW}{_PRICED}",
        "above average": r"\b(?:above|more than|higher than)(?: the)? average"
        rf"|{_PRICED}{_IS}(?:above|higher than) average",
        "moderate": rf"\bmoderat\w+(?!{_FEW}{_RATED})|\b(?:mid|medium|middle|average(?:ly)?|fair(?:ly)?|decent(?:ly)?)"
        rf"{_FEW}{_PRICED}"
        rf"|\bmid(?:dle)?[- ]?(?:range|rage)|{_PRICED}{_IS}(?:average|mid|medium|moderate|fair)\w*"
        r"|(?:£ ?|pounds? )?20 ?(?:£|pounds)? ?(?:-|–|to|and|through) ?(?:£ ?)?25",
        "high": rf"(?<!in)(?<!not )(?<!not too )\bexpensive|\bpric(?:e)?y\b|\bcostly|upscale"
        rf"|\bhigh(?:er|ly|est)?(?:[- ]end)?{_FEW}{_PRICED}|{_PRICED}{_IS}(?:high|expensive)\w*"
        r"|(?:more|higher|greater) th[ae]n (?:£ ?|pounds? )?30\b"
        r"|(?:over|above|excess of|>|at least|from|upwards of) ?(?:£ ?|pounds? )?30\b"
        r"|£ ?30 (?:or|and) (?:more|over|above|up)",
    },
    "customer rating": {
        "low": rf"\b(?:low(?:er|est|ly)?|poor(?:ly)?|bad(?:ly)?|terrible|negative|one|1){_FEW}{_RATED}"
        rf"|{_RATED}{_IS}(?:low|poor|bad|terrible)\w*|\b(?:1|one) (?:out )?of (?:a possible )?(?:5|five)\b|\b1 ?/ ?5\b"
        rf"|not{_FEW}(?:good|well|high|highly){_FEW}{_RATED}",
        "average": rf"(?<!above )(?<!than )\b(?:average(?:ly)?|mediocre|moderate(?:ly)?|middling|3|three){_FEW}{_RATED}"
        rf"|{_RATED}{_IS}(?:average|mediocre|moderate)\w*|\b(?:3|three) (?:out )?of (?:a possible )?(?:5|five)\b|\b3 ?/ ?5\b",
        "high": rf"\b(?:high(?:er|est|ly)?|great|excellent|top|best|outstanding|perfect|(?<!of )(?<!/)(?:5|five)){_FEW}{_RATED}"
        rf"|{_RATED}{_IS}(?:high|great|excellent|outstanding|perfect)\w*"
        r"|\b(?:5|five) (?:out )?of (?:a possible )?(?:5|five)\b|\b5 ?/ ?5\b",
        "good": rf"(?<!not )(?<!not a )(?<!not very )\b(?:good|well|decent(?:ly)?|positive|favou?rable|reasonabl[ey]){_FEW}{_RATED}"
        rf"|{_RATED}{_IS}(?:good|well|decent)\w*|above[- ]average{_FEW}{_RATED}",
    },
    "area": {
        "city centre": r"\b(?:city|town)(?:'s)?[- ]?(?:cent|core|area)\w*|\bcent(?:re|er|ral|rally)\b(?! street)|downtown",
        "riverside": r"\briver\w*|\bwaterfront|\bwaterside",
    },
}
"""Slot -> meaning -> phrasings, on lower-case text in which proper names are masked."""

MEANING_OF = {
    "less than £20": "cheap",
    "£20-25": "moderate",
    "more than £30": "high",
    "1 out of 5": "low",
    "3 out of 5": "average",
    "5 out of 5": "high",
}
"""Values that are another way to say a meaning (all others mean themselves)."""

LOOSE = {
    ("priceRange", "affordable"): frozenset({"cheap", "moderate"}),
    ("priceRange", "above average"): frozenset({"moderate", "high"}),
    ("customer rating", "good"): frozenset({"average", "high"}),
}
"""Meanings that agree with several others."""

_KIN = r"(?:famil(?:y|ies)|famliy|kids?|child(?:ren)?(?:'?s)?)"
FAMILY = rf"\b{_KIN}\b|\ball ages\b"
"""Words that say a place is for families, unless they are part of a negation."""

_NO = (
    r"(?:\bnot?\b|n't\b|\bnon\b|\bnever\b|\bwithout\b|\bnor\b|\bun|\bisnt\b|\barent\b|\bdoesnt\b|\bcannot\b|\bnone\b"
    r"|\blacks?\b|\bavoid\b|\bleave\b)"
)
_STEP = r"(?:(?!\bbut\b|\bhowever\b|\balthough\b)[^.!?;§,])"
NOT_FAMILY = (
    rf"{_NO}{_STEP}{{0,40}}?\b{_KIN}(?:[- ](?:friendly|orient\w+|or \w+))?\b"
    rf"|\b{_KIN}\b{_STEP}{{0,30}}?(?:\b(?:not|un(?:friendly|welcome)|prohibited|banned|discouraged|free)\b|n't\b)"
    r"|\badults?\b(?![- ]friendly and)"
)
"""Phrasings that say a place is not for families."""
