"""`python -m kandinsky_exp`, also what `accelerate launch -m kandinsky_exp` starts."""

import sys

from kandinsky_exp.cli import main

if __name__ == "__main__":
    sys.argv[0] = "kandinsky-exp"  # what Hydra calls it in its help
    main()
