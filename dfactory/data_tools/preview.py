"""Show examples as the model sees them: what is prompt, what is trained, what noise takes away.

    dfactory data preview FILE ... --model DIR [--rows 3] [--block-size 32]

Each document is shown with its EOS and the fill to whole blocks, and below it one view at mask ratio 0.5. Marks are those of
`dfactory check`.
"""

import itertools
from pathlib import Path

from rich.text import Text

from dfactory.commands.preview import Decode, decoder_of, document_text, legend, view_text
from dfactory.config.words import RECORDS_HELP
from dfactory.console import plain_console
from dfactory.data.examples import DocumentRules, read_documents
from dfactory.data.fields import BadRow, Pair
from dfactory.data.pairs import SIDES
from dfactory.data.records import read_records
from dfactory.data_tools.command import add_vocabulary_arguments, parser_of, vocabulary_of
from dfactory.errors import ConfigError
from dfactory.noise import RandomMask
from dfactory.packing import align
from dfactory.types import AlignedDocument, Example, View

PLAIN_WIDTH = 120  # of the output where there is no terminal


def main(words: list[str] | None = None) -> int:
    parser = parser_of("preview")
    parser.add_argument("files", nargs="+", help=RECORDS_HELP)
    add_vocabulary_arguments(parser, required=True)
    parser.add_argument("--rows", type=int, default=3, help="of each file (default: 3)")
    parser.add_argument("--first", type=int, default=1, help="number of the first row shown (default: 1)")
    parser.add_argument("--pairs", action="store_true", help="read rows as preference pairs where they can be both")
    parser.add_argument("--max-length", type=int, default=2048, help="cut documents here (default: 2048)")
    parser.add_argument("--block-size", type=int, default=32, help="(default: 32)")
    options = parser.parse_args(words)
    for name in ("rows", "first", "max_length", "block_size"):
        if vars(options)[name] < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {vars(options)[name]}: give 1 or more")

    console = plain_console()
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    vocabulary = vocabulary_of(options)
    special, decode = vocabulary.special, decoder_of(vocabulary)
    rules = DocumentRules(options.max_length, "truncate", special.eos, vocabulary.size, special.mask)
    masks = RandomMask(special.mask, 0, low=0.5, high=0.5)
    console.print(legend())
    for path in options.files:
        records = itertools.islice(
            read_records(path, options.pairs), options.first - 1, options.first - 1 + options.rows
        )
        for row in read_documents(records, path, vocabulary.encoder, rules):
            origin = f"{Path(path).name}:{row.number}"
            if isinstance(row.finished, BadRow):
                console.print(Text.assemble((f"{origin} refused: ", "bold red"), str(row.finished)), soft_wrap=True)
                continue
            names = SIDES if isinstance(row.record, Pair) else itertools.repeat("document")
            for name, document in zip(names, row.finished, strict=False):
                example = Example(row.number, *document.tokens, f"{origin}, {name}")
                aligned = align(example, options.block_size, special.eos)
                for text in described(example, aligned, masks(aligned, 0)[0], special.mask, decode):
                    console.print(text, soft_wrap=True)
    return 0


def described(example: Example, aligned: AlignedDocument, view: View, mask_id: int, decode: Decode) -> list[Text]:
    """A headline, the document, and one of its views."""
    title = f"{example.origin}: {len(example)} tokens, {int(example.trainable_T.sum())} trained"
    return [
        Text(title, "bold"),
        document_text(example, aligned.input_ids_T, example.trainable_T, decode),
        view_text(view, aligned, len(example), mask_id, decode),
    ]
