"""Methods side by side on one checkpoint: ``apet compare --model-path M --data DATA --methods all``.

One model load; every (benchmark, method, budget, seed) is answered, recorded and scored in a folder of its own, and a
finished one is never run again. Then one table with paired bootstrap intervals, and one picture. What the numbers mean
and how they are computed: docs/compare.md. The modules, in the order in which they are used:

    plan       which cells there are: methods x budgets x seeds, and which are skipped for what reason
    tasks      a benchmark's files, also of its first N questions, and its scorer
    execute    answers and scores cells, resumably
    bootstrap  paired resampling of the pictures
    results    cells to rows of the table
    difficulty questions that average pooling answers too, apart from the others
    table      rows as Markdown and CSV
    plot       rows as curves
"""
