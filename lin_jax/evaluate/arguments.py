"""The command line of `eval.py`."""

from lin_jax.attentions.registry import preset_names
from lin_jax.evaluate.speculative import METHODS
from lin_jax.settings.command_line import OneLineParser
from lin_jax.settings.generate import GenerateConfig


def make_parser(description: str | None) -> OneLineParser:
    """Return the parser of its arguments."""
    parser = OneLineParser(description)
    parser.add_argument("--task", choices=["perplexity", "speculative"], default="perplexity")
    parser.add_argument("--checkpoint", required=True, metavar="RUN", help="a run's directory, or RUN/checkpoints/STEP")
    parser.add_argument("--batch_size", type=int, default=8, help="windows or texts at a time")
    parser.add_argument("--output", metavar="FILE", help="JSON file (default: RUN/evaluation.json or speculative.json)")
    perplexity = parser.add_argument_group("perplexity")
    perplexity.add_argument("--path", nargs="+", metavar="FILE", help="evaluate on all of these files or globs instead")
    perplexity.add_argument("--window", type=int, help="tokens the model sees at a time (default: as in training)")
    perplexity.add_argument("--stride", type=int, help="tokens between starts of windows (default: half the window)")
    speculative = parser.add_argument_group("speculative")
    speculative.add_argument("--prompts", metavar="FILE", help='.jsonl with "turns", "prompt" or "text", or a text')
    speculative.add_argument("--separator", default="<|endoftext|>", help="between the prompts of a text")
    speculative.add_argument("--limit", type=int, default=80, help="prompts; 0 takes all")
    speculative.add_argument("--longest", type=int, default=512, help="tokens to which a prompt is cut")
    speculative.add_argument("--max_new_tokens", type=int, default=128, help="tokens after which a text ends")
    speculative.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "medusa"])
    speculative.add_argument("--tree", default=GenerateConfig().tree, help="a published tree, or a .json file of paths")
    speculative.add_argument(
        "--attention", nargs="+", choices=preset_names(), default=[], help="(default: the model's own)"
    )
    speculative.add_argument("--split", action="store_true", help="also time the parts of a step")
    return parser
