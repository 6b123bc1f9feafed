"""Train all weights of the base and the head.

The steps are in llmrec_peft/recipes/train.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/full.py \
    --config recipes/configs/movies/full.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("full")

if __name__ == "__main__":
    main()
