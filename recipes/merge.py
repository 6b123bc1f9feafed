"""Merge a bundle into a stock sequence classifier for Transformers, and verify that the predictions are equal.

The steps are in llmrec_peft/recipes/merge.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/merge.py \
    --bundle OUT/bundle --data.path DIR --output_dir out/merged
"""

from llmrec_peft.cli import launcher

main = launcher("merge")

if __name__ == "__main__":
    main()
