"""Class-activation maps and word scores, their scale, and checks of them against masks and randomized weights."""
