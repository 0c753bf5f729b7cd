"""A web page to try it: ``apet demo`` (extra ``demo``).

Drop a picture, ask, slide the budget, choose two methods: their answers side by side, the kept tokens and merge groups
over the picture, and what each answer costs. Runs offline on the sample model, or on any checkpoint that the loader
reads; listens on this machine only. The modules:

    answers  the model side: one question, one method, one budget
    page     the page
"""
