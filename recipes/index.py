"""Fit a retrieval index and collaborative models on a log, and stack them with the predictions of a bundle.

The steps are in llmrec_peft/recipes/index.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/index.py \
    --bundle OUT/bundle --data.path DIR --valid_targets 5000
"""

from llmrec_peft.cli import launcher

main = launcher("index")

if __name__ == "__main__":
    main()
