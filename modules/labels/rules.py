"""Phrase tables of the rule-based CheXpert-style labeler: which words name, negate and doubt an observation.

Every entry is a regular expression over one sentence as ``sentences.split_sentences`` returns it. The conventions are
those of the CheXpert labeler (Irvin et al., 2019, arXiv:1901.07031), which a radiologist does not always share: a
stable heart size counts as uncertain, any "contour" as a mention of the cardiomediastinum, an endplate as a device.
"""

Table = str | dict[str, str] | tuple[tuple[str, str, int], ...]

# The tables that make up the labeler; ``labeler.RuleLabeler`` takes replacements for them by name.
TABLES = (
    "FINDINGS", "ANATOMY", "NOT_MENTIONS", "WEAK_MENTIONS", "IMPLIED", "OTHER_FINDINGS", "SCOPE_END", "ONE_SIDE",
    "KEPT", "NEGATION_BEFORE", "UNCERTAIN_BEFORE", "DENIAL_DOUBTED", "UNCERTAIN_AFTER", "NEGATION_AFTER",
    "DENIED_AFTER", "IS_ENLARGED", "NORMAL", "NOT_NORMAL", "SIZE_DOUBTED", "STABLE", "STABLE_BEFORE_NORMAL", "ENLARGED",
    "CONVENTIONS",
)  # fmt: skip

CLASSES = (
    "No Finding",
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Lesion",
    "Lung Opacity",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)

# Child -> parent in the hierarchy of observations (Irvin et al., 2019, figure 1), from the leaves to the roots.
PARENTS = {
    "Cardiomegaly": "Enlarged Cardiomediastinum",
    "Pneumonia": "Consolidation",
    "Consolidation": "Lung Opacity",
    "Lung Lesion": "Lung Opacity",
    "Edema": "Lung Opacity",
    "Atelectasis": "Lung Opacity",
}

# Words that name something abnormal by themselves: positive unless negated or doubted.
FINDINGS = {
    "Enlarged Cardiomediastinum": r"(?<=widened )mediastinum|(?<!no )(?<!typical )(?<!without )mediastinal widening",
    "Cardiomegaly": r"cardiomegaly|cardiac enlargement|enlarged heart|enlargement of the (?:heart|cardiac)"
    r"|(?:ventricular|\blv) enlargement",
    "Lung Lesion": r"\bmass(?:es|like)?\b|\bnodules?\b|nodular (?:densit|opaci)\w+|\blump\w*"
    r"|cavitary lesions?|carcinomas?|neoplasms?|tumou?rs?\b|metastas[ei]s",
    "Lung Opacity": r"opaci\w+|air ?-?space disease|infiltrat\w+|interstitial (?:marking|pattern|lung)\w*"
    r"|reticula(?:r (?:marking|pattern)\w*|tion)|\bscar(?:s|ring)?\b|(?:peribronchial|wall) thickening"
    r"|increased densit\w+|decreased translucency|\bhazy (?:\w+ )?(?:bas\w+|lungs?|lobe)\b|ground[ -]glass",
    "Edema": r"edema|heart failure|\bchf\b|(?:vascular|pulmonary) congestion|vascular prominence|indistinctness",
    "Consolidation": r"consolidat\w+",
    "Pneumonia": r"pneumonias?\b|infecti\w+|\bpna\b",
    "Atelectasis": r"atelecta\w+|\batx\b|\bcollapse[ds]?\b",
    "Pneumothorax": r"pneumo-?thora\w+|\bptx\b",
    "Pleural Effusion": r"effusions?|pleural fluid",
    "Pleural Other": r"pleural thickening|fibrosis|fibrothorax|pleural (?:parenchymal )?scar\w*",
    "Fracture": r"fractur\w+",
    "Support Devices": r"pacer|pacemaker|defib|device|tube|catheter|cannula|hardware|screw|plate|arthroplast"
    r"|port-a-cath|mediport|dob+hoff|swan[ -]ganz|balloon pump|pigtail|(?:chest|infusion) port\b|pacing (?:wire|lead)s?"
    r"|\b(?:a?icds?(?: / pacemaker)?|valves?|lines?|picc|drains?|coils?|markers?|rods?|ett|ngt|ogt|cvc|cvl|iabp)\b"
    r"|support (?:apparatus|equipment)",
}

# Anatomy whose size or outline is reported: its label follows from "normal", "stable" or "enlarged" in its sentence.
ANATOMY = {
    "Enlarged Cardiomediastinum": r"(?<=\s)mediastinum|mediastinal (?:silhouette|configuration)s?"
    r"|cardiomediastinum|(?:cardiomediastinal|pericardial) silhouettes?|contours?\b",
    "Cardiomegaly": r"(?<!over )(?<!behind )\bthe heart\b|^heart:|\bheart size"
    r"|cardiac (?:silhouette|size|contour|shadow)s?",
}

# Phrases that look like a mention and are not.
NOT_MENTIONS = {
    "Lung Lesion": r"calcified nodules?",
    "Lung Opacity": r"pleural scar\w*",
    "Support Devices": r"(?:fracture|kerley(?: b)?|septal|fissural|joint) lines?",
    "Pleural Effusion": r"pericardial effusions?",
}

# Mentions that merely suggest the observation: uncertain where another would be positive.
WEAK_MENTIONS = {"Edema": r"congestion|vascular prominence|indistinctness"}

# A finding that leaves another observation in doubt: uncertain too where the finding is positive or uncertain.
IMPLIED = {"Cardiomegaly": r"heart failure|chf"}

# Findings outside the classes: they say nothing about the 13 observations, and they rule out No Finding.
OTHER_FINDINGS = (
    r"granuloma|degenerat|atheroscle|emphysem|calcifi|(?<!clear and )hyperinflat(?!ed but clear)|hyperexpansion"
    r"|eventration|adenopathy|lymph|bronchiecta|density|hernia|blunt|\bcopd\b|osteopeni|osteodystroph|elevat|kypho"
    r"|prominen|fullness|scoliosis|deformity|bulla|azygos fissure|foreign bod|bullet|tracheostomy|aneurysm"
    r"|pneumo(?:mediastin|periton)|free (?:intraperitoneal |subdiaphragmatic )?air|ha?ematoma|ha?emorrhag|contusion"
    r"|dislocation|sarcoid|pleural plaque|volume loss|\bcavit(?:y|ies)\b|bronchospasm|asthma|airways disease"
    r"|bronchi(?:ti|oliti)s|cephalization|aspiration|cuffing|thicken(?:ing|ed)|osteophytosis|radiopaque|arthropathy"
    r"|aortic disease|pericardial effusion|defibrillator|hypertension|hilar enlargement|trachea is (?:\w+ )?deviated"
    r"|(?:mediastinal|tracheal) (?:shift|deviation)|(?:shift|deviation) of the (?:mediastinum|trachea)"
)

# How far a cue reaches: to the end of its sentence, but not over the following.
_PRESENT = (  # how something that is there is described: "no effusion, small nodule"
    r"(?:small(?:er)?|larger|less|more|mild\w*|moderate\w*|severe\w*|tiny|trace|minimal\w*|slight\w*|subtle|marked\w*"
    r"|stable|unchanged|persist\w+|residual|chronic|old|known|(?:in|de)creas(?:ed|ing)|improv(?:ed|ing)"
    r"|worsen(?:ed|ing)|left|right|bilateral|bibas\w+|basal|basilar|patchy|hazy|streaky|linear|multiple|several"
    r"|scattered|heal(?:ed|ing))\b"
)
_NO_OR = r"(?![^;:]*\b(?:or|nor)\b)"  # but "no fracture, small nodule, or effusion" is one list
SCOPE_END = (
    r":|\(|;(?! (?:or|nor)\b)(?![^;]*; (?:or|nor)\b)|(?:^| )-+ |(?:,|\band) there (?:is|are)\b"
    r"|\b(?:but|however|although|though|except|whereas|while|apart from|other than|positive for)\b|(?<!not )\byet\b"
    r"|, (?=(?:findings?|this|these|which|consistent|compatible|suggest\w*|likely|possibl[ey]|probabl[ey])\b)"
    r"|\b(?:and|which|that) (?=(?:may|might|could|likely|probably|possibly)\b)"
    r"|, (?!(?:or|and|nor)\b)(?=[^,]*\b(?:(?:is|are) (?:again|still|unchanged|stable|new)|remains?|persists?"
    r"|in (?:place|situ|(?:\w+ ){0,2}position))\b)"
    rf"|, (?=[\w ]+ (?:is|are) {_PRESENT}){_NO_OR}"
    rf"|(?:,|\band|\bwith)(?: an?| the)? (?={_PRESENT}){_NO_OR}|, (?=(?:the|an?) ){_NO_OR}"
    r"|\b(?:pneumothora(?:x|ces)|effusions?|consolidations?|edema|pneumonia) "  # cleaned texts have no commas
    rf"(?!more|less)(?={_PRESENT}){_NO_OR}"
    r"|\b(?:after|following|given)\b"
)
# "Left but no right effusion": a denial of the other side between a side and its finding is left out.
ONE_SIDE = (
    r"(?:(?<=left)|(?<=right))(?:[ -](?:sided|upper|middle|mid|lower|lobe|lung|base|basal|basilar|apical|pleural))*,?"
    r" (?:but|and) (?:no|not)(?: an?)? (?=(?:left|right)\b)"
)
# "No increase in the effusion", "without clearing of": what has not changed is there.
_CHANGE = (
    r"(?:changes?|increase|decrease|progress(?:ion)?|worsening|deterioration|improvement|enlargement|growth|expansion"
    r"|extension|resolution|clearing|regression|reduction|difference|shrinkage)"
)
_DEGREE = (
    r"(?:(?:significant|appreciable|interval|substantial|evidence|signs?|of|for|further|obvious|definite|gross|relevant"
    r"|major|marked|clear|any|real|visible|radiographic|noticeable|considerable|yet|complete|full|overall|great) )*"
)
KEPT = (
    rf"\b(?:no|without|not|nor|or) {_DEGREE}{_CHANGE} (?:in|of|from|to|for|since)\b"
    rf"|\bno {_DEGREE}change $|\bfailure of\b|\bno (?:doubt|question)(?: about| of| that)?\b"
)

# Cues before a finding; those that end in $ must come right before it.
NEGATION_BEFORE = (
    r"\b(?:no|without|not(?! (?:seen on (?:the )?(?:prior|previous|lateral)|possible to|exclude|rule out)\b)"
    r"(?!.*\b(?:due|secondary) to)|nor|neither|negative for|free of|clear of|absen(?:t|ce of)|rather than|history of)\b"
    r"|\bclear $"
    r"|(?<!partial )(?<!partially )(?<!incomplete )(?<!near )(?<!nearly )(?<!almost )(?<!some )"
    r"\b(?:resol(?:ved|ution of)|clear(?:ed|ing of|ance of)|remov(?:ed|al of)|disappearance of|withdrawal of) "
    r"(?:(?!with\b)[\w-]+ )*$"
)
UNCERTAIN_BEFORE = (
    r"\b(?:may|might|could|would|possibl[ey]|possibilit\w+|probabl[ey]|likely|perhaps|suspicious for|suspect\w*"
    r"|suspicion|concern\w*|question(?:able|ed| of)|query\b|worrisome|equivocal|doubtful|unclear|uncertain|whether"
    r"|presum\w*|if any|potential\w*|differential|consider(?:ations?)?\b|exclud(?:e[sd]?|ing)|rul(?:es?|ed|ing) out"
    r"|r / o|(?:evaluat\w+|assess\w*|correlat\w+) for|(?:thought|believed|felt) to (?:be|represent|reflect|indicate)"
    r"|suggests?\b|suggestion|favou?rs?\b|favou?red over"
    r"|(?:versus|vs|(?<!acute )(?<!left )(?<!right )(?<!old )or)(?: \w+){0,2} $)|/ $"
)
# What turns a denial into doubt: "the absence of an effusion is not certain".
DENIAL_DOUBTED = (
    r"\babsence of .*\b(?:not|cannot|can not)\b.*\b(?:certain|confirmed|sure|assured|established|proven|guaranteed)"
    r"|\b(?:cannot|can not|not|un)(?: be)?(?: \w+)? ?(?:certain|sure|confident|confirm)\b.*\b(?:no|absence)\b"
)
# Cues after a finding; those that begin with ^ must come right after it.
UNCERTAIN_AFTER = (
    r"^ (?:(?:versus|vs)\b|/|favou?red over\b)|^,? if (?:any|present)\b|^(?: \w+){0,2} (?:more|less|most) likely\b"
    r"|^(?:(?:,(?! (?:no|without|there|and)\b)(?: [\w-]+){1,3})*,)? or\b"  # "effusion, small mass, or both"
    r"|^ (?:can|could|may|might|would) (?:also )?(?:be (?:present|there|hidden)|have|look|give|(?:co-?)?exist|appear)\b"
    r"|\b(?:(?:cannot|can not|could not|not)(?: \w+){0,2} (?:excluded|ruled out)"
    r"|difficult to (?:exclude|assess|evaluate)"
    r"|(?:must|should|needs? to|has to|have to|to) be (?:\w+ )?(?:excluded|ruled out|considered)"
    r"|(?:is|are|remains?|seems?|appears?)(?: considered)? (?:possible|suspected|questioned|doubtful|questionable"
    r"|uncertain|unclear|(?:\w+ )?(?:un|less )?likely|favou?red(?! (?:to|as))|(?:in|on) the differential"
    r"|an? (?:\w+ )?(?:possibility|consideration))|suspected|questioned|may not be (?:seen|\w+ed)"
    r"|not (?:well|clearly|fully|adequately) (?:seen|evaluated|visuali[sz]ed|assessed)"
    r"|(?:poorly|incompletely|suboptimally) (?:seen|evaluated|visuali[sz]ed|assessed))\b|\?"
)
_EARLIER = (
    r"(?! (?:on|in) (?:the |an? )?(?:\w+ )?(?:lateral|frontal|prior|previous|earlier|old)| (?:previously|before)\b)"
)
_PARTLY = r"(?:not|never|nearly|almost|near|partial(?:ly)?|partly|largely|mostly|incomplete(?:ly)?|only|somewhat)"
_GONE = r"(?:removed|resolved|cleared|gone|disappeared|withdrawn(?! (?:by|to|slightly|\d))|pulled(?! back)|taken out)"
_NOT_THERE = (
    r"(?:not (?!(?:well|clearly|fully|adequately) (?:seen|visuali[sz]ed))(?:(?!previously)\w+ )?"
    r"(?:seen|visible|identified|visuali[sz]ed|present|demonstrated|evident|appreciated|apparent|noted|found|detected)"
    rf"{_EARLIER}|no longer|absent|{_GONE})\b"
)
NEGATION_AFTER = (
    rf"^,?(?: (?!previously\b)\w+)? {_NOT_THERE}|^ removal\b|\[gone\]"
    r"|(?<!not appear to )(?<!not seem to )\b(?:is|are|was|were|has|have|had)(?: been| now| since)* "
    rf"(?:(?!{_PARTLY}\b)\w+ )?(?:{_GONE}|ruled out|excluded)\b"
)
# Right after a finding or the list that it ends, "... or effusion is not seen", and the answer "Pneumothorax: none."
# These outrank a doubt before the finding; the other cues after it do not.
_LIST = r"(?:(?:,(?: [\w-]+){1,3})*,? (?:or|and|nor)(?: [\w-]+){1,3})?"
_OWN_WORDS = r"(?: (?!(?:and|or|with|but|which|that|is|are|was|were|has|have)\b)[\w-]+){0,8}(?:, [^,;:]*,)?"
DENIED_AFTER = (
    rf"{_LIST}{_OWN_WORDS} (?:is|are|was|were|can|could)(?: be)? {_NOT_THERE}"
    rf"|{_LIST} ?[:=] ?(?:no|none|absent|negative|nil)\b(?! change)"
    r"| ?(?:-+|\() ?(?:no(?=\W*$|[.,;)])|none|absent|negative(?! for)|nil)\b"
)

# What a sentence says of the heart and mediastinum. "Upper limits of normal" is normal only after "at the".
NORMAL = (
    r"\b(?:normal|unremarkable|(?:is|are) clear|not (?:\w+ )?(?:enlarged|widened)"
    r"|no (?:\w+ ){0,2}(?:enlargement|widening) of)\b"
)
# Right after the name; outranks "clear" and "unremarkable" elsewhere in the sentence, but not "normal".
IS_ENLARGED = (
    r" (?:is|are|appears?|remains?|looks?)(?: (?!no|possibl|probabl|question)\w+){0,2} (?:enlarged|widened|dilated)\b"
    r"(?!.*\bnormal\b)"
)
NOT_NORMAL = (
    r"(?<!at the)(?<!at)(?<!within)(?: upper| top| first) limits? of normal|at top limits"
    r"|of the limits of normal|upper limits normal|appears? normal limits|at the upper limits of normal size"
    r"|\bha(?:s|ve) (?:a |become )?normal"
    r"|\b(?:enlarged|large|increased|prominent)(?: in size)? (?:with|and|but) [^,]*normal"
)
SIZE_DOUBTED = (
    r"\b(?:possibl[ey]|questionabl[ey]|probabl[ey]|(?:may|might|could) be) (?:\w+ )?(?:enlarged|widened|prominent)\b"
)
STABLE = r"\b(?:stable|unchanged|borderline (?:heart|cardiac)|no (?:\w+ ){0,2}change in)\b"
STABLE_BEFORE_NORMAL = (
    r"\b(?:is|are|appears?|remains?) (?:\w+ )?(?:stable|unchanged) and within"
    r"|\bstable, normal|\bstable with normal"
)
# These outrank "stable" for the class that they are about.
ENLARGED = {
    "Enlarged Cardiomediastinum": r"\bwidening of\b|\bcontour (?:abnormality|irregularity)\b",
    "Cardiomegaly": r"(?<!stable )\benlarged\b|\b(?:large|increased|enlargement)\b",
}

# Parsing errors of the CheXpert labeler, mostly in terse sentences: (class, pattern, label).
CONVENTIONS = (
    ("Cardiomegaly", r"\bthe heart size(?: size)? and .*\bappear\b", 1),
    ("Cardiomegaly", r"\bthe heart pulmonary \w+ appear|\btechnical factors heart size\b|\bheart size xxxx within", 1),
    ("Cardiomegaly", r"\band [a-z ]* not enlarged", 1),
    ("Enlarged Cardiomediastinum", r"mediastinum (?:of|within) normal", 1),
    ("Enlarged Cardiomediastinum", r"normal heart size mediastinal", 1),
    ("Enlarged Cardiomediastinum", r"stable cardiomediastinal silhouette with normal", -1),
    ("Enlarged Cardiomediastinum", r"with stable (?:appearance of the )?cardiomediastinal", -1),
    ("Enlarged Cardiomediastinum", r"the heart and (?:cardio)?mediastinal [a-z ]*(?:stable|unchanged)", 1),
    ("Enlarged Cardiomediastinum", r"silhouette stable\W*$", 1),
    ("Enlarged Cardiomediastinum", r"cardiomegaly and mediastinal", 1),
    ("Pneumonia", r"^no (?:\w+ )+to suggest [^.]*pneumonia", 1),
    ("Pleural Effusion", r"^no (?:\w+ )+to suggest [^.]*effusion", 1),
    ("Fracture", r"^no [^.]*\b(?:displaced|thoracic) \w+ [^.]*fractures(?! (?:is|are))", 1),
    ("Lung Opacity", r"^no \w+ air space opacities\W*$", 1),
    ("Consolidation", r"^no \w+ air ?space consolidations\W*$", 1),
    ("Consolidation", r"^no \w+ airspace consolidation or \w+\W*$", -1),
    ("Consolidation", r"^no (?:[\w ]+, )+or \w+ air space consolidation\W*$", 1),
    ("Consolidation", r"^no xxxx focal consolidations?(?: or|,)", -1),
    ("Pneumothorax", r"^no xxxx focal consolidations, pneumothorax, or", -1),
    ("Pleural Effusion", r"^no xxxx focal consolidations, pneumothorax, or pleural effusion", -1),
    ("Pneumothorax", r"^no pleural effusions or pneumothorax\W*$", 1),
    ("Pneumothorax", r"^no(?: \w+){2} (?:consolidation|collection) or \w+\W*$", -1),
    ("Pleural Effusion", r"^no(?: \w+){2} consolidation or \w+\W*$", -1),
)
