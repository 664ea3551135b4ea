"""How much work a grammar may be, in the trial of it and in use. No JAX here: the trial's process starts with it."""

from llguidance import LLParserLimits

# A tenth of what llguidance allows by itself, where that stands for seconds or gigabytes.
LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=50_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=50_000,
    precompute_large_lexemes=False,
    verbose_errors=False,  # an error does not repeat the text
)
