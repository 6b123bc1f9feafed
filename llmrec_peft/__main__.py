"""`python -m llmrec_peft` is the command `llmrec`."""

from llmrec_peft.cli import main

if __name__ == "__main__":
    main()
