"""Draw the figures of finished runs, for ``fedbags figures`` and at the end of ``fedbags simulate``.

curves.png              training loss, and held-back bags, round by round
confusion-LEVEL.png     pooled test images, a matrix per level
tsne.png                test images and bags of them on a plane
activation.png          where the model finds the leaf that it predicts

draw.py draws them all, and style.py holds the style of every figure of this project. matplotlib and
scikit-learn take long to import, so they are imported below this package only (and where style.py is used).
"""
