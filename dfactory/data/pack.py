"""The former name of `dfactory.packing`; it goes in the next release."""

import warnings

from dfactory.packing import LOOKAHEAD, PackedDocument, Packer, align, block_of, collate, pack_rows, share

__all__ = ["LOOKAHEAD", "PackedDocument", "Packer", "align", "block_of", "collate", "pack_rows", "share"]

warnings.warn("dfactory.data.pack is now dfactory.packing: import from there", DeprecationWarning, stacklevel=2)
