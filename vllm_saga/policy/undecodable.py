"""What decoding bytes from outside as JSON may raise."""

from __future__ import annotations

import msgspec

#: msgspec raises the first for what is no JSON or of the wrong shape, the second for strings that
#: are no text, and the third where arrays are nested too deep.
UNDECODABLE = (msgspec.DecodeError, UnicodeError, RecursionError)
