"""Tickets: a customer's message to a shop, and the one-line JSON ticket a clerk would write for it.

Every field can be read off the message: the product and the order number are copied from it, the category, the
priority and the refund follow from what is said. What is not said has a fixed value: no order number is `null`, no
hint of haste is `normal`, no wish for money back is `false`.
"""

import json

from grammar import Draw, sentence

SYSTEM = "Write the ticket as JSON."

PRODUCTS = [
    "desk lamp", "kettle", "coffee grinder", "office chair", "rain jacket", "keyboard", "backpack", "toaster",
    "blender", "bike light", "yoga mat", "alarm clock", "wall shelf", "sleeping bag", "garden hose", "phone case",
]  # fmt: skip

# $product is "the desk lamp", "my desk lamp" or so; $it the same thing once it has been named. Each pattern is one
# clause that tells what happened; nothing in one category's clauses belongs to another.
PROBLEMS = {
    "delivery": [
        "$product {has not arrived|still hasn't arrived|never arrived|hasn't turned up|didn't come|never showed up} {yet||so far|even though it was due $day|and I have waited $span}",
        "{I am still waiting for|I'm waiting for|we are still waiting for} $product {to arrive|to be delivered||, ordered $span ago}",
        "{the tracking|tracking|the courier's page|the tracking page} {says|shows|claims} $product was {delivered|dropped off|left at the door} {but|, yet} {nothing is here|I never got it|there is no parcel|nobody has seen it}",
        "{the parcel|the delivery|the package|the shipment} with $product {is late|is lost|is $span overdue|has been stuck {at the depot|in customs|in transit} {since $day|for $span}|seems to be lost in the post}",
        "where is $product? {It was due|It was promised for|You said it would come} $day",
        "{can you find out|any idea|I wonder|please tell me} where $product is{?|, {I have waited|it has been} $span}",
        "{your driver|the courier|the delivery man} {never came|did not come|missed us again|left without ringing}, so $product is {still at the depot|not here|who knows where}",
        "$product {was meant to arrive|was supposed to come|should have come|should have arrived|ought to be here since} $day {and|but} {the doorstep is empty|there is no sign of it|it has not been delivered}",
    ],
    "damage": [
        "$product {arrived|came|turned up|was delivered} {broken|cracked|smashed|with a big scratch|dented|in pieces|bent|with a torn seam|chipped|scratched all over}",
        "{the box was {crushed|wet|torn open|squashed} and|when I opened the box,|the parcel was soaked and|out of the box,} $product {is|was} {cracked|broken|dented|damaged|in two pieces|bent out of shape|ruined}",
        "{I unpacked|we unpacked|I just opened|I opened} $product and {found|saw|discovered} {a crack|a dent|a deep scratch|broken parts|a hole|a snapped corner} {in it|on the side|underneath|right away|on the front}",
        "{there is|there's} {a crack|a large dent|an ugly scratch|a hole|a chip} in $product {straight from the box|and it only came $day|which was delivered $day|, fresh from your parcel}",
        "{something|one part|a corner|an edge} of $product {was snapped off|was shattered|had broken off|was crushed} {on the way here|in the post|during shipping|in transit}",
        "{sadly|unfortunately|sorry to say,|} $product {did not survive the shipping|got damaged in the post|was badly packed and broke on the way|suffered in transport, {one side is dented|it is cracked}}",
    ],
    "wrong_item": [
        "{you sent|I was sent|I received|we got|I got} {the wrong $bare|a $bare in the wrong {colour|size}|a different $bare {than|from what} I ordered|the wrong model of $bare}",
        "$product {is|came in|arrived in} the wrong {colour|size|version}{|, I {asked for|ordered|chose} {the blue one|the small one|the black one|the large one|a green one}}",
        "$product {is not the one|isn't the one|is not what|isn't what} {I ordered|I picked|was on my order|I asked for}{|, {it is red, not grey|mine should be black|this one is much smaller|it's another model}}",
        "{there must be a mix-up|someone mixed something up|a mix-up, I think|looks like a mix-up}: $product {is another colour than I ordered|is a different model|is meant for somebody else|is the old version instead of the new one}",
        "{I ordered|I asked for|my order was for} {a black|a blue|a large|a small|a grey} $bare {but|and} {got|received|you sent|the parcel held} {a white one|a pink one|the tiny one|another one|a yellow one}",
        "{instead of|in place of} {the green|the big|the plain|the red|the new} $bare {you shipped|there was|I found|you packed} {a brown one|a different one|the wrong one|one in another size}",
    ],
    "billing": [
        "{I was|I've been|my card was|we were} charged {twice|two times|double|three times} for $product",
        "{the invoice|the bill|your invoice|the receipt} for $product {is wrong|shows the wrong amount|lists it twice|has the wrong {name|address|tax} on it|is too high}",
        "{you took|you charged|my bank shows|I paid} $price {euros|dollars|pounds} {too much for|more than the listed price for|more than agreed for} $product",
        "{the discount|my voucher|the coupon|the promised discount|my gift card} {was not applied to|was ignored for|did not count for|is missing on the bill for} $product",
        "{there is|I see|I found|my bank shows} {a second payment|an extra charge|an extra fee|a strange fee} {for $product on my card|on the bill for $product|on my statement for $product}",
        "{I never got|I still need|I am missing|please send me|could you send} {an invoice|a receipt|a proper invoice|the bill} for $product",
        "{the price|the amount} {on my card|on the invoice|you booked} {does not match|is higher than|isn't} {the price on your site|what I agreed to|the offer} for $product",
    ],
    "warranty": [
        "after {|just|only|barely} $span {of use|of normal use|}, $product {stopped working|gave up|died|fell apart|broke down|no longer works}",
        "$product {stopped working|quit working|died|gave out|broke|wore out} {after $span|within $span|after only $span|, I have had it for $span}",
        "$product {worked fine|was great|was fine|did its job} for $span {but now it|and then it|and now it|, then it} {is dead|stopped|makes a horrible noise|fails all the time|is falling apart|has given up}",
        "{I have used|I've had|we have owned} $product for $span {and now|, and|but now} {it no longer works|it is worn through|it has failed|it makes strange noises|it comes apart}",
        "{is|isn't} $product still under {warranty|guarantee}? It {failed|broke|stopped|gave up} after $span",
        "{I'd like to make|I want to make|this is|here is} a {warranty|guarantee} claim {for|about|on} $product{|, it {lasted only $span|failed after $span|died after $span}}",
    ],
    "question": [
        "{how do I|how can I|what is the best way to|can you tell me how to} {clean|store|set up|look after|repair|adjust} $product{| properly| safely| without tools}?",
        "is $product {suitable|good|fine|safe|the right thing} for {children|outdoor use|a small flat|daily use|beginners|travelling}?",
        "{do you sell|are there|can I buy|where do I find} {spare parts|a carrying bag|a replacement cover|an extra set of screws|accessories} for $product?",
        "{what is|what's|could you tell me} {the weight|the exact size|the material|the height|the width} of $product?",
        "{I can't find|I lost|I need|please send me} the {manual|instructions|user guide|English manual} for $product",
        "{is there|where can I get|do you have} {a manual|a guide|instructions} {in English||in large print} for $product?",
        "{does|will} $product {also come in|come in|exist in} {green|other colours|a larger size|a bigger version|white}?",
        "{I am thinking of buying|I might buy|before I buy|I want to buy} {a second $bare|another $bare|one more $bare}, {how heavy is it|is it waterproof|what is it made of|is it in stock}?",
    ],
}  # fmt: skip

# The message may name the product first and speak of "it" afterwards.
PREAMBLES = [
    "{I bought|I ordered|I purchased|we ordered|I got} {a|the} $bare {from you|from your shop|on your site|online||at your store} {$span ago|$day||recently||the other day}",
    "{this is about|it's about|I'm writing about|I am contacting you about|this concerns|my message is about} {my|the|a} $bare{| {from your shop|from your site|I ordered $day}}",
    "{my|our} $bare {again|, once more|: a problem|: a short note}",
    "{subject|re|about}: $bare",
]

ORDER = [
    "{my|the|our} order {number|no.|id|} is $order",
    "order {number|no.|id|}: $order",
    "{it is|that's|that is|it's|this was} order {number|no.|} $order",
    "{order|ref.|reference|order ref.} $order",
    "{you will find it|you'll find it|it's|look it up} under {order|number|reference|} $order",
    "{the confirmation|your email|the receipt|the label|my mail from you} says {order|} $order",
    "($order)",
    "{number|order}: #$order",
]

# Nothing to copy: these talk of order numbers or carry other numbers.
NO_ORDER = [
    "{I can't find|I lost|I don't have|I no longer have|sorry, I deleted} {the order number|my order number|the confirmation mail}",
    "{I paid|it cost|it was|I spent} $price {euros|dollars|pounds} {for it||in total|back then}",
    "{call me|you can reach me|my phone is|ring me} {on|at|under} $phone",
    "{I live|we live} {at number $price|in flat $price|on floor $small}",
    "{I have been|I've been} {a customer|buying from you} {since $year|for $small years}",
]

PRIORITY = {
    "high": [
        "{this is|it's|please, this is|this is very} urgent",
        "{please {hurry|reply today|act fast|answer at once}|I need {an answer|help|a solution} {today|right now|immediately|by tonight}|I need this {solved|sorted|fixed} {today|by tomorrow|right away}}",
        "{as soon as possible|asap|right away|immediately}{, please|}",
        "{my {wedding|exam|flight|trip|move|birthday} is|we {leave|travel|move|depart}|I {leave|fly|travel} } {tomorrow|tonight|in two days|the day after tomorrow} {so it cannot wait|and I can't wait|, so please be quick|and time is short}",
        "{it|this|that} {can't|cannot} wait",
    ],
    "low": [
        "{there is no|there's no|no} {hurry|rush}{| {at all|whatsoever|on my side|from my side}}",
        "{take your time|whenever you {have time|get to it|find a moment|can}|answer when you can|any time this month is fine|next month is fine too|at your leisure}{|, really|, no stress}",
        "{it is|it's|this is} not {urgent|pressing|important|a big deal}{| at all}",
        "{I can wait|we can wait|it can wait}{| {a while|a few weeks|until next month|as long as needed}}",
    ],
}

REFUND = [
    "{I want|I'd like|I would like|we want|I demand|please give me} {my money back|a refund|a full refund|back what I paid}",
    "{please|kindly} {refund me|refund it|refund the amount|pay me back|return my money|send my money back|give me my money back}{| {to my card|to my account}}",
    "{can you|could you|would you} {refund me|refund it|refund the amount|pay me back|return my money|send my money back|give me my money back}{|, please| {to my card|to my account}}?",
    "{a refund|my money back|a full refund} {is all I want|would be best|is what I'm after|, please|please}",
]
NO_REFUND = [
    "{I don't want|no need for|I am not asking for|I do not need} {a refund|my money back}{|, {a replacement will do|just help me|an answer is enough|just sort it out}}",
    "{please|kindly|just} {send a new one|send me another one|look into it|replace it|swap it|help me|fix this|sort it out|exchange it}",
    "{could you|can you|would you} {send a new one|send me another one|look into it|replace it|swap it|help me|fix this|sort it out|exchange it}?",
    "{a replacement|a new one|an exchange|a short answer|some help} {is all I need|would be great|would do|, please}",
    "{what should I do|what now|what can be done|how do we solve this|what are my options}?",
]

OPENINGS = [
    "{hi|hello|hey|good morning|good evening|good day}{| there| team| all|, support}{,|!|.}",
    "{dear {team|support|shop|sir or madam|customer service}},",
    "{hope you are well|I hope this finds you well|sorry to bother you|me again|quick one|first message here|not sure who to ask}{.|,|:|!}",
]
CLOSINGS = [
    "{thanks|thank you|many thanks|cheers|thanks a lot|thx}{|!| in advance| for your help}",
    "{best|kind regards|best wishes|yours|regards|bye},? {Ana|Tom|Mr. Okafor|Lena|J. Novak|Priya|Sam|Mrs. Lind|Wei|Karim|Rosa|Dag}",
    "{greetings|all the best}, {Ines|Paul|Yuki|Olu|Marta|Finn|Zoe|Ravi}",
]
ASIDES = [
    "{normally I love your shop|your shop is usually great|I usually like your things|friends told me you are good}",
    "{my neighbour|my sister|a colleague|my son|a friend} {has the same one|recommended you|bought one too|gave me the tip}{| and is {happy|fond of it}}",
    "{it was|it is|it's} {a present|a gift} {for my {mother|brother|boss|daughter|aunt}}",
    "{the weather here is awful|we just moved house|I work from home|I am no expert|my English is not so good, sorry|the dog barked all day}",
    "{I already wrote|I have written|I called|I tried the chat} {$day|$small times|once} {and nobody answered|without luck|and got cut off|but no reply}",
]

DAYS = ["on Monday", "on Tuesday", "last Friday", "on Saturday", "yesterday", "last week", "on the 3rd", "on 12 May", "on Sunday", "this morning"]  # fmt: skip
SPANS = ["two weeks", "three days", "5 days", "a month", "six months", "10 days", "a whole week", "four weeks", "8 months", "half a year", "one summer", "nine days"]  # fmt: skip


def order_number(draw):
    """An order number in one of the shop's formats."""
    letter = lambda: draw.pick("ABCDEFGHKLMNPRSTVWXZ")  # noqa: E731
    return draw.pick(
        [
            lambda: f"{letter()}-{draw.digits(4)}",
            lambda: f"{letter()}{letter()}-{draw.digits(3)}",
            lambda: draw.digits(5),
            lambda: f"{draw.digits(2)}-{draw.digits(3)}",
            lambda: f"{letter()}{draw.digits(4)}",
        ]
    )()


def mistype(draw, text, kept):
    """`text` with one slip of the keys, outside the words in `kept`."""
    words = text.split(" ")
    fair = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha() and not any(w in k or k in w for k in kept)]
    if not fair:
        return text
    i = draw.pick(fair)
    word = words[i]
    at = 1 + draw.below(len(word) - 2)
    words[i] = draw.pick(
        [
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],  # two letters swapped
            word[:at] + word[at + 1 :],  # one letter lost
            word[:at] + word[at] + word[at:],  # one letter doubled
        ]
    )
    return " ".join(words)


def ticket(draw):
    """One message and its ticket: `(message, ticket)`."""
    bare = draw.pick(PRODUCTS)
    names = {
        "bare": bare,
        "order": order_number(draw),
        "day": draw.pick(DAYS),
        "span": draw.pick(SPANS),
        "price": draw.digits(2),
        "small": str(2 + draw.below(7)),
        "year": str(2012 + draw.below(13)),
        "phone": f"0{draw.digits(2)} {draw.digits(4)}",
    }
    category = draw.pick(list(PROBLEMS))
    priority = draw.pick(["high", "normal", "low"])
    refund = category != "question" and draw.chance(0.45)
    has_order = draw.chance(0.7)

    problem = draw.pick(PROBLEMS[category])
    body = []
    if "$bare" not in problem and draw.chance(0.4):
        # Named first, "it" afterwards.
        names["product"] = "it"
        lead = [draw.pick(PREAMBLES), problem]
    else:
        names["product"] = draw.pick(["the ", "my ", "our ", "the ", "my "]) + bare
        lead = [problem]
    if has_order:
        body.append(draw.pick(ORDER))
    elif draw.chance(0.4):
        body.append(draw.pick(NO_ORDER))
    if priority != "normal":
        body.append(draw.pick(PRIORITY[priority]))
    if refund:
        body.append(draw.pick(REFUND))
    elif category != "question" and draw.chance(0.5):
        body.append(draw.pick(NO_REFUND))
    if draw.chance(0.2):
        body.append(draw.pick(ASIDES))

    # The story keeps its order; everything else may stand anywhere around it.
    body = draw.shuffle(body)
    at = draw.pick([0, 0, 0, len(body), draw.below(len(body) + 1)])
    parts = body[:at] + lead + body[at:]
    if draw.chance(0.45):
        parts.insert(0, draw.pick(OPENINGS))
    if draw.chance(0.35):
        parts.append(draw.pick(CLOSINGS))

    parts = [sentence(draw.expand(part, names)) for part in parts]
    message = " ".join(parts)
    kept = bare.split(" ") + [names["order"]]
    for _ in range(draw.pick([0, 0, 0, 0, 1, 2])):
        message = mistype(draw, message, kept)
    if draw.chance(0.12):  # all in small letters, but for the number
        message = message.lower().replace(names["order"].lower(), names["order"])

    return message, {
        "category": category,
        "product": bare,
        "priority": priority,
        "order_id": names["order"] if has_order else None,
        "refund": refund,
    }


def written(row):
    """What is measured for distinctness: the message."""
    return row["messages"][1]["content"]


def row(message, label):
    """The row of the dataset: a conversation whose answer is the ticket on one line."""
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(label, separators=(",", ":"))},
        ]
    }


def rows(seed, count, distinct):
    """`count` rows no two of which share more than `distinct` allows."""
    draw = Draw(seed)
    made = []
    while len(made) < count:
        message, label = ticket(draw)
        if 8 <= len(message.split()) <= 48 and distinct.accept(message):
            made.append(row(message, label))
    return made
