"""`python -m kandinsky_exp`, also what `accelerate launch -m kandinsky_exp` starts."""

from kandinsky_exp.cli import main

if __name__ == "__main__":
    main()
