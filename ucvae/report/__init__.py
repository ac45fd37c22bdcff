"""What ``ucvae-report`` makes of the folders of runs: tables and curves over seeds.

It reads what runs leave beside their checkpoints, so it needs neither torch nor the components
that made them, and reads what other versions wrote as far as the fields are there.
"""
