"""A reconstruction from its first to its last block."""


def run(made):
    """Its reports."""
    for _ in made.remaining:
        made.begin()
        for _ in range(made.iterations):
            made.step()
        made.end()
    return made.reports
