"""Dialogues: a workshop's booking desk and a router's support line, two to four exchanges each, with a system message.

The assistant is terse and keeps one manner: it asks for what is missing, repeats what it understood, and closes with
a line that starts with `Booked:` or `Solved:`. That manner is what a model can pick up from these rows.
"""

from grammar import Draw, sentence

DESKS = {
    "bike workshop": {
        "job": ["a puncture", "new brake pads", "a full service", "a bent wheel", "a slipping chain", "a creaking crank"],
        "thing": ["city bike", "old racer", "cargo bike", "mountain bike", "folding bike", "e-bike"],
    },
    "piano tuner": {
        "job": ["a tuning", "a sticky key", "a buzzing string", "a worn pedal", "a check before a concert"],
        "thing": ["upright", "baby grand", "old piano", "school piano", "concert grand"],
    },
    "tailor": {
        "job": ["shorter sleeves", "a new zip", "a torn lining", "a wider waist", "a fitting", "patched elbows"],
        "thing": ["winter coat", "suit", "wedding dress", "leather jacket", "pair of jeans", "uniform"],
    },
    "boiler engineer": {
        "job": ["a yearly check", "low pressure", "a dripping valve", "no hot water", "a noisy pump"],
        "thing": ["gas boiler", "heat pump", "old boiler", "storage heater", "water heater"],
    },
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
TIMES = ["8:30", "9:00", "9:45", "10:15", "11:00", "13:30", "14:15", "15:00", "16:30", "17:45"]
PEOPLE = ["Amara", "Bo", "Chen", "Dina", "Emil", "Farah", "Goran", "Hana", "Idris", "Jule", "Kofi", "Lucia", "Mads", "Noor", "Otis", "Pilar"]  # fmt: skip

FAULTS = [
    {
        "what": "the wifi drops {every few minutes|each evening|when I close the door|as soon as two of us are online}",
        "ask": "{Which light is on at the front|What colour is the middle light}: green, amber or red?",
        "seen": "{it's|it is|the light is|I see} amber{| and {blinking|steady}}",
        "do": "{Move the router off the floor, away from the microwave|Change the channel to {1|6|11} under Settings, Wireless|Update the firmware under Settings, System}",
    },
    {
        "what": "{nothing loads|no page opens|I have no internet|everything is offline} {since last night|since the storm|this morning|after I moved the desk}",
        "ask": "{Is the grey cable in the port marked WAN|Which port holds the grey cable}?",
        "seen": "{it was|I found it|oh, it sat|it is} in port {2|3|4}",
        "do": "{Put it into WAN and wait {two|three} minutes|Plug it into WAN, then restart the box}",
    },
    {
        "what": "{I forgot|I lost|nobody here knows|my brother changed} the {admin password|wifi password|router login}",
        "ask": "{Can you reach|Do you see} the small button on the back?",
        "seen": "{yes, next to the power plug|I see it, under the label|yes|found it, it is tiny}",
        "do": "{Hold it for {ten|twelve} seconds until all lights go out, then use the code on the label|Press it with a paper clip for {ten|fifteen} seconds and choose a new password}",
    },
    {
        "what": "{the printer|my tablet|the television|my game console|the doorbell camera} {won't join the network|can't find the wifi|says wrong password|connects and then fails}",
        "ask": "{Does it know the 5 GHz band|Is it an older model, 2.4 GHz only|How old is it}?",
        "seen": "{I think it is old|from 2014, I believe|the box says 2.4 GHz|it's about {eight|nine|ten} years old}",
        "do": "{Turn on 2.4 GHz under Settings, Wireless, and join the network ending in -24|Make a guest network on 2.4 GHz and use that one}",
    },
    {
        "what": "{downloads are|the speed is|everything is} {slow|painfully slow|a tenth of what we pay for} {upstairs|in the kitchen|over the cable too|at night}",
        "ask": "What does a speed test {next to the router|by cable|in the same room} {say|show}?",
        "seen": "{about|only|roughly} {12|18|23|31|40} megabits",
        "do": "{Swap the old cable for one marked Cat 6|Set the router to 5 GHz and put the repeater halfway|Turn off the traffic limit under Settings, Quality}",
    },
]


def _say(turns, role, text):
    turns.append({"role": role, "content": text})


def booking(draw):
    """A booking of two to four exchanges."""
    desk = draw.pick(list(DESKS))
    job, thing = draw.pick(DESKS[desk]["job"]), draw.pick(DESKS[desk]["thing"])
    day, time, name = draw.pick(DAYS), draw.pick(TIMES), draw.pick(PEOPLE)
    other = draw.pick([t for t in TIMES if t != time])
    names = {"job": job, "thing": thing, "day": day, "time": time, "name": name, "other": other, "desk": desk}
    e = lambda pattern: sentence(draw.expand(pattern, names))  # noqa: E731
    turns = []
    _say(turns, "system", e("You take bookings for a $desk. {Be brief|Short answers|Keep it short}. Close with a line that starts with Booked:"))
    known_day = draw.chance(0.5)
    opening = "{hello|hi|good morning|hey|hi there}, {I have a $thing, and it's about $job|it's about my $thing: $job|I'm calling for my $thing, $job|can you look at my $thing? Reason: $job|$job on my $thing, is that something you do}"
    _say(turns, "user", e(opening + (" {, on $day|, $day if possible|, and $day would suit me}" if known_day else "")))
    if not known_day:
        _say(turns, "assistant", e("{$job on a $thing, gladly|A $thing, $job, noted|Noted: $thing, $job}. {Which day suits you|What day works for you|When would you like to come}?"))
        _say(turns, "user", e("{$day|$day, please|how about $day|$day would be good|only $day works for me}{| {after work|before noon|if that's free}}"))
    offered = other if draw.chance(0.4) else time
    names["offered"] = offered
    _say(turns, "assistant", e("{On $day I have $offered|$day, $offered is free|I can offer $day at $offered|I could do $day, $offered}. {Does that work|Shall I take it|Is that fine}, and {on which name|what is your name|who is coming}?"))
    if offered != time:
        _say(turns, "user", e("{$offered is too {early|late} for me|I can't make $offered|not at $offered, sorry}, {is $time free|could it be $time|what about $time}?"))
        _say(turns, "assistant", e("{Yes, $time is free|$time works|$time is fine too}. {Your name, please|On which name|And your name}?"))
    _say(turns, "user", e("{$name|it's $name|$name, thanks|on $name, please|my name is $name}"))
    _say(turns, "assistant", e("{Thank you, $name|Done, $name|All set|Good}. Booked: $thing, $job, $day $time, $name"))
    return turns


def support(draw):
    """A support dialogue of two to four exchanges."""
    fault = draw.pick(FAULTS)
    e = lambda pattern: sentence(draw.expand(pattern))  # noqa: E731
    turns = []
    _say(turns, "system", e("You help people with their home router. {One step at a time|Ask one thing at a time|Give one step per answer}. Close with a line that starts with Solved:"))
    _say(turns, "user", e("{hi,|hello,|help:|hey, I need help:|good evening,|hello support,|} " + fault["what"]))
    _say(turns, "assistant", e("{Let's see|Sorry to hear that|We will find it|Thanks for writing|First things first}. " + fault["ask"]))
    _say(turns, "user", e(fault["seen"] + "{|. What now?|. What does that mean?|. Is that bad?|. Is it broken?}"))
    step = draw.expand(fault["do"])
    _say(turns, "assistant", sentence(step) + " " + e("{Tell me what happens.|Is it better now?|What do you see then?|Did that help?|Then try again, please.}"))
    if draw.chance(0.35):
        _say(turns, "user", e("{nothing changed|no, the same|still the same|I tried, no luck}{| {so far|yet|, sorry}}"))
        _say(turns, "assistant", e("{Then|In that case|All right, then} {unplug it for {ten|thirty|sixty} seconds and try again|restart it and do the step once more|reset it to factory settings, then repeat the step}. {And now|Better|Did that do it}?"))
    _say(turns, "user", e("{yes, {it works|that did it|all fine}|great, it works now|it works{|, thank you}|that was it{|, thanks}|everything is back}"))
    short = step[:1].lower() + step[1:]
    _say(turns, "assistant", e("{Good to hear|Glad it works|Wonderful|You're welcome}.") + " Solved: " + sentence(short)[:1].lower() + sentence(short)[1:])
    return turns


def written(row):
    """What is measured for distinctness: all that the two of them say."""
    return " ".join(t["content"] for t in row["messages"] if t["role"] != "system")


def rows(seed, count, distinct):
    """`count` conversations, half of each kind, no two of which share more than `distinct` allows."""
    draw = Draw(seed)
    made = []
    while len(made) < count:
        turns = booking(draw) if len(made) % 2 else support(draw)
        row = {"messages": turns}
        if distinct.accept(written(row)):
            made.append(row)
    return made
