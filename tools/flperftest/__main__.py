"""``python -m flperftest``."""

from flperftest.cli import main

main()
