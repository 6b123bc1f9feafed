"""Rank items for a file of users with a trained bundle, with probabilities.

The steps are in llmrec_peft/recipes/recommend.py:

accelerate launch --config_file accelerate_configs/single_cpu.yaml recipes/recommend.py \
    --bundle out/movies/bundle --data.path DIR --users out/users.parquet --k 10 --output_dir out/recommended
"""

from llmrec_peft.cli import launcher

main = launcher("recommend")

if __name__ == "__main__":
    main()
