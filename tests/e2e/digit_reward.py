"""A reward that a random model gets differing amounts of: the share of digits in the response."""


def score(response: str, label: str, metadata: dict) -> float:
    return sum(character.isdigit() for character in response) / max(len(response), 1)
