"""Notes: short paragraphs of an invented workshop's handbook, for continued pretraining on plain text."""

from grammar import Draw, sentence

MACHINES = [
    {"name": "the lathe", "part": ["chuck", "tool post", "tailstock", "lead screw", "belt"], "made": ["spindles", "bowls", "table legs"]},
    {"name": "the kiln", "part": ["door seal", "heating coil", "thermocouple", "shelf", "vent"], "made": ["tiles", "mugs", "test pieces"]},
    {"name": "the loom", "part": ["heddle", "shuttle", "warp beam", "treadle", "reed"], "made": ["scarves", "blankets", "sample strips"]},
    {"name": "the printing press", "part": ["roller", "ink tray", "gripper", "platen", "flywheel"], "made": ["posters", "cards", "book covers"]},
    {"name": "the band saw", "part": ["blade", "upper guide", "fence", "table", "dust port"], "made": ["boards", "templates", "chair backs"]},
    {"name": "the forge", "part": ["blower", "hearth", "anvil", "quench tank", "flue"], "made": ["hooks", "hinges", "chisels"]},
    {"name": "the laser cutter", "part": ["lens", "mirror", "honeycomb bed", "air pump", "extractor"], "made": ["boxes", "signs", "gaskets"]},
    {"name": "the sewing machine", "part": ["needle", "bobbin case", "feed dog", "presser foot", "hand wheel"], "made": ["bags", "aprons", "banners"]},
]  # fmt: skip

RULES = [
    "{Before you start|Before each use|At the start of a shift}, {check|look at|clean|feel} the $part of $machine {for play|for cracks|for dust|with the power off}",
    "$machine is {switched on|started} {only by people on the list|by two people together|after the bell|once the $part is in place}",
    "{Never|Do not} {touch|adjust|oil} the $part while $machine is {running|warm|under load}; {wait until it stops|pull the plug first|use the wooden stick|ask Ilse if in doubt}",
    "{A worn|A loose|A dirty} $part {makes itself heard|shows in the work|is the usual cause of trouble}: {the sound turns dull|the edges come out rough|the $made no longer match|it rattles}",
    "{The $part|A new $part} {lasts|is good for|should be changed after} {about|at most|no more than} $n {hours|days of work|batches of $made}",
    "{We keep|You will find|There is always} a spare $part {in drawer $n|in the blue cabinet|behind the door|on shelf $n}; {write it down when you take it|the last one is never taken without a word|it is labelled in red}",
    "{For $made|When you make $made}, {set|keep|turn} the {speed|feed|heat|pressure} {to mark $n|low|to half|a little higher than you would think} {and go slowly|and let it settle|, then try on scrap first|and listen}",
    "{In the evening|After work|When you are done}, {sweep|wipe|brush} $machine, {loosen|release|cover} the $part and {note the hours in the book|close the valve|switch off at the wall|hang up the key}",
    "{Beginners|New members|Guests} {make $made first|work with someone who has made $n {$made}|start on scrap}, {because mistakes there are cheap|so that the hand learns the $part|and nobody minds a slow start}",
    "{Once a month|Every $n weeks|Each spring} {Ilse|Ravi|old Bert|the Tuesday group} {oils|measures|takes apart|replaces} the $part; {$machine stays closed that day|it takes an hour|anyone may watch}",
    "{If|When} $machine {stops by itself|smells of burning|trips the fuse|shakes}, {press the red button|step back|switch off}, {leave the $part as it is|open the window} and {call Ravi|write on the board what you saw|wait $n minutes}",
    "{Our $made|The $made from $machine} are {sold at the market|given to the school|kept for repairs} {in $season|twice a year}; {the money pays for a new $part|$n of them paid for the $part}",
]


def note(draw):
    """One paragraph about one machine."""
    machine = draw.pick(MACHINES)
    rules = draw.shuffle(RULES)[: 3 + draw.below(3)]
    said = []
    for rule in rules:
        names = {
            "machine": machine["name"], "part": draw.pick(machine["part"]), "made": draw.pick(machine["made"]),
            "n": 2 + draw.below(38), "season": draw.pick(["spring", "summer", "autumn", "winter"]),
        }  # fmt: skip
        said.append(sentence(draw.expand(rule, names)))
    title = draw.expand("{About|Notes on|Handbook:|On|Working with} " + machine["name"])
    return f"{title}. {' '.join(said)}"


def written(row):
    """What is measured for distinctness: the paragraph."""
    return row["text"]


def rows(seed, count, distinct):
    """`count` paragraphs no two of which share more than `distinct` allows."""
    draw = Draw(seed)
    made = []
    while len(made) < count:
        row = {"text": note(draw)}
        if distinct.accept(written(row)):
            made.append(row)
    return made
