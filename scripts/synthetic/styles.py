"""How six imagined radiologists dictate: order, normal sentences, negations, and reports they say word by word."""

from dataclasses import dataclass

Normal = tuple[float, tuple[str, ...]]  # share of reports that say it; wordings, the usual one first


@dataclass(frozen=True)
class Style:
    """One way to put a report together; ``weight`` is its share of all reports."""

    weight: float
    terse: bool  # findings in telegram style
    order: str  # h heart and mediastinum, l lungs, n negations, b bones, d devices
    heart: Normal
    mediastinum: Normal
    vessels: Normal
    lungs: Normal
    denial: str
    denied: tuple[tuple[str, ...], ...]  # lists of phrases.DENIED, the usual list first
    bones: Normal
    canned: tuple[str, ...]  # whole reports of normal studies, the usual one first


_NEVER: Normal = (0.0, ())

STYLES = (
    Style(
        weight=0.50,
        terse=False,
        order="hlnbd",
        heart=(1.0, ("The heart is normal in size.", "The heart size is normal.", "The heart is not enlarged.")),
        mediastinum=(
            0.7,
            (
                "The mediastinum is unremarkable.",
                "The mediastinal contours are unremarkable.",
                "Mediastinal structures lie in the midline.",
            ),
        ),
        vessels=_NEVER,
        lungs=(1.0, ("The lungs are clear.", "Both lungs are clear.", "The lungs are grossly clear.")),
        denial="There is no {}.",
        denied=(
            ("pleural effusion", "pneumothorax"),
            ("focal infiltrate", "pleural effusion"),
            ("focal consolidation", "pleural effusion", "pneumothorax"),
        ),
        bones=(
            0.35,
            (
                "The bony structures are intact.",
                "The skeletal structures are unremarkable.",
                "The thoracic cage shows no focal destruction.",
            ),
        ),
        canned=(
            "The heart is normal in size. The mediastinum is unremarkable. The lungs are clear. There is no "
            "pleural effusion or pneumothorax.",
            "The heart is normal in size and contour. The lungs are clear, without evidence of infiltrate. "
            "There is no pneumothorax or effusion.",
        ),
    ),
    Style(
        weight=0.18,
        terse=True,
        order="dhlbn",
        heart=(1.0, ("Heart size normal.", "Heart size within normal limits.", "Heart normal.")),
        mediastinum=(0.3, ("Mediastinum normal.", "Mediastinal contours unremarkable.")),
        vessels=(0.3, ("Pulmonary vascularity normal.", "Hila unchanged.", "Aorta smooth.")),
        lungs=(1.0, ("Lungs are clear.", "Lungs clear and expanded.", "Lungs well aerated, no active disease.")),
        denial="No {}.",
        denied=(
            ("pneumonia", "effusion", "edema", "pneumothorax", "nodules"),
            ("pneumonia", "effusion", "edema", "pneumothorax", "adenopathy", "nodules", "masses"),
            ("pneumothorax", "pleural effusion"),
        ),
        bones=(0.35, ("Bony thorax intact.", "Osseous structures intact.", "Age appropriate skeleton.")),
        canned=(
            "Heart size normal. Lungs are clear. No pneumonia, effusion, edema, pneumothorax or nodules.",
            "Both lungs are clear and expanded. Heart and mediastinum normal.",
        ),
    ),
    Style(
        weight=0.12,
        terse=False,
        order="hlnbd",
        heart=(1.0, ("The cardiac silhouette is within normal limits for size.", "The cardiac silhouette is normal.")),
        mediastinum=(
            0.6,
            (
                "Mediastinal contours are normal.",
                "The trachea is midline.",
                "The hilar shadows are symmetric and of usual density.",
            ),
        ),
        vessels=(0.6, ("Pulmonary vasculature is within normal limits.", "The pulmonary vascularity is unremarkable.")),
        lungs=(
            1.0,
            (
                "The lungs are clear bilaterally.",
                "The lungs are normally inflated and clear.",
                "Both lungs show good inspiration and no parenchymal disease.",
            ),
        ),
        denial="Specifically, no evidence of {}.",
        denied=(("focal consolidation", "pneumothorax", "pleural effusion"),),
        bones=(
            0.75,
            (
                "Visualized osseous structures are without acute abnormality.",
                "Osseous structures and soft tissues are within normal limits.",
            ),
        ),
        canned=(
            "The cardiomediastinal silhouette is within normal limits. The lungs are clear bilaterally. "
            "Specifically, no evidence of focal consolidation, pneumothorax or pleural effusion. Visualized "
            "osseous structures are without acute abnormality.",
        ),
    ),
    Style(
        weight=0.08,
        terse=True,
        order="nlhdb",
        heart=(1.0, ("Normal heart size.", "Normal cardiac size.")),
        mediastinum=(0.6, ("Normal mediastinal contour.",)),
        vessels=_NEVER,
        lungs=(0.6, ("Clear lungs.", "Lungs otherwise clear.", "Good lung expansion.")),
        denial="No {}.",
        denied=(("focal airspace disease", "pneumothorax", "large pleural effusion"), ("pneumothorax", "effusion")),
        bones=(0.5, ("No acute bony abnormality.", "Bones unremarkable.", "Ribs and clavicles preserved.")),
        canned=(
            "No focal airspace disease, pneumothorax or large pleural effusion. Cardiac and mediastinal contours "
            "are within normal limits. No acute bony abnormality.",
        ),
    ),
    Style(
        weight=0.07,
        terse=False,
        order="dlnhb",
        heart=(1.0, ("Cardiac size appears normal.", "Heart size is within normal limits.")),
        mediastinum=(0.4, ("Hilar and mediastinal contours are sharp and normal.",)),
        vessels=(0.4, ("Pulmonary vascularity is normal.",)),
        lungs=(1.0, ("The lungs are well expanded and free of focal abnormality.", "There are no acute infiltrates.")),
        denial="Negative for {}.",
        denied=(("pneumothorax", "pleural effusion"), ("pleural effusion", "suspicious mass")),
        bones=(0.5, ("Limited bone evaluation reveals no acute findings.",)),
        canned=(
            "The lungs are well expanded and free of focal abnormality. Negative for pneumothorax or pleural "
            "effusion. Cardiac size appears normal.",
        ),
    ),
    Style(
        weight=0.05,
        terse=False,
        order="lnhbd",
        heart=(1.0, ("The heart is normal in appearance.",)),
        mediastinum=(0.7, ("Mediastinal structures are midline and normal.",)),
        vessels=(0.3, ("Central vessels are of normal caliber.",)),
        lungs=(1.0, ("Clear and symmetric lung fields.", "Lungs demonstrate no acute process.")),
        denial="I see no {}.",
        denied=(("pleural fluid collection", "pneumothorax"), ("focal infiltrate", "pleural fluid collection")),
        bones=(0.4, ("The ribs and spine show no gross abnormality.",)),
        canned=("No acute cardiopulmonary abnormality identified. Clear and symmetric lung fields.",),
    ),
)
