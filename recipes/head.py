"""Train the classification head only: the cheapest method and the baseline of the others.

The steps are in llmrec_peft/recipes/train.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/head.py \
    --config recipes/configs/movies/head.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("head")

if __name__ == "__main__":
    main()
