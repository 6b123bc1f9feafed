"""Train bottleneck adapters.

The steps are in llmrec_peft/recipes/train.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/adapter.py \
    --config recipes/configs/movies/adapter.yaml --data.path DIR --output_dir OUT
"""

from llmrec_peft.cli import launcher

main = launcher("adapter")

if __name__ == "__main__":
    main()
