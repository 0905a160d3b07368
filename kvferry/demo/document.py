"""The demo's long document (about 1,500 tokens), written for it, and the questions about it."""

QUESTIONS = (
    "In two sentences: why did the village build the second ferry?",
    "Who keeps the tide book, and what is written in it?",
)


def document() -> str:
    """The text, one line a paragraph: a model asked about it imitates the line breaks that it sees."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in _TEXT.split("\n\n"))


_TEXT = """\
The Two Ferries of Harrow Reach

Harrow Reach is a village on both banks of the river Senn, about four miles above the point where the river
becomes the sea. There has never been a bridge. The river there is six hundred yards wide at high water, and its
bed is a soft grey mud that has swallowed every pile that anybody drove into it. So the people of the village
cross by ferry, and they have done so for as long as there have been records, which is three hundred and eleven
years.

For most of that time there was one ferry. It was a flat boat, thirty feet long, that was pulled across along a
rope by the ferryman and by whoever among the passengers was willing to help. The boat carried twenty people, or
six people and a cart, or two cows and a worried farmer. A crossing took a quarter of an hour when the tide was
slack and nearly an hour when it ran. The ferryman's house stood on the north bank, beside the inn, and a bell
hung on the south bank so that people there could call him over.

The trouble with one ferry was the waiting. A man who came to the south bank with a load of apples might find
the boat on the north side, taking on a flock of sheep. He would ring the bell, and then he would sit down.
Loading the sheep took time. Crossing took time. Unloading the sheep took more time, because sheep do not like
to leave a boat any more than they like to enter it. Only then could the apples be loaded, and it did not matter
that they were a small load which could have crossed in a few minutes. Everything waited for the slowest thing
in front of it. On market days the line of carts on the south bank reached back past the chapel, and the apples
at the end of it were not what they had been in the morning.

It was Maren Oake, the schoolteacher, who first wrote down what was going wrong. For one month in the spring she
sat on the north bank after lessons with a notebook and a watch. She wrote down when each load arrived, how long
it took to bring it on board, and how long it took to cross. When she added up her columns she found something
that surprised the village council. The boat spent two thirds of its day standing still. It was not slow at
crossing; it was slow at loading. And loading and crossing, she said, were two different kinds of work, which
one boat was being made to do in turn. The loading wanted many hands and a wide ramp, and the crossing wanted a
light boat and one person who knew the river. While the boat did the one it could not do the other.

Her proposal was simple. Let there be two boats. One would lie always at the landing, tied to the ramp, and be
loaded there by the loading gang without any hurry. The other would be out on the water. When the boat on the
water came in, the two would change places: the loaded one would go at once, and the empty one would be tied to
the ramp. No one who was ready to cross would ever again have to wait for someone who was not. The council
argued about it for two winters, because a second boat cost four hundred crowns, and then a wedding party missed
its own wedding because of a load of pigs. The council voted for the second ferry the following week, and it was
launched in the autumn with a good deal of cider.

The two boats were named the Patience and the Hurry, and they made the village richer than anyone had expected.
In the first year the number of crossings doubled. In the third year a merchant from the coast built a warehouse
on the south bank, because he could now rely on his goods being on the other side by noon. The inn added a
second floor. Maren Oake was asked to stand for the council, and she refused, saying that she already had thirty
children to govern.

But two boats brought a difficulty of their own, and it was the warehouse that showed it. The same goods kept
crossing again and again. A barrel of salt would go north on Monday for the fish market, and an identical barrel
would go north on Tuesday, and another on Wednesday, each loaded and unloaded with the same labour. It was
Tobias Fenn, the keeper of the warehouse, who asked why the village did not simply keep a store of salt on the
north bank. Anything that was wanted often could wait there, already across. The ferry would then only have to
carry what was new. He was given the old boat shed for it, and he painted a number on every shelf, so that a
person who wanted something could be told at once where it was, or be told honestly that it was not there and
would have to be fetched.

Fenn was a careful man, and he made three rules for the store that are still painted on its door. The first rule
is that every barrel carries a label that says what is in it, who filled it, and on what day; a barrel without a
label is not salt, whatever it tastes like. The second rule is that a barrel is opened and looked at before it
is handed out, because the river gets into everything. If the salt is wet, it is thrown away and a new barrel is
sent for, and nobody is blamed. The third rule is that when the shelves are full, the barrel that nobody has
asked for in the longest time makes room. A store, Fenn used to say, is a convenience. The village lived without
it before and it can live without it again for a day; but a store that hands out bad salt is worse than no store
at all.

The tide decides everything else. The Senn rises and falls eleven feet at Harrow Reach, and twice a day, for
about an hour, the current runs so hard that neither boat can cross with a full load. The times of these hours
are kept in the tide book. The tide book has always been kept by the bell ringer, who lives on the south bank,
since it is from there that the water gauge can be read. Today the bell ringer is Ilse Brandt, whose mother and
grandmother rang the bell before her. Each morning and each evening she writes down the height of the water, the
direction of the wind, and the hour of the turn, and beside these she writes the name of any boat that was out
when the current began to run. In three hundred years the book has filled forty volumes. Only nine boats are
named in them as late, and only one as lost. That was the old rope ferry, in the great flood, and there was
nobody on board but a goose, which swam ashore and was found the next morning on the steps of the inn.

When fog comes down on the river, the boats do not stop, but they change their habits. The bell is rung once
every minute, and the ferryman steers by the sound. If the ferryman falls ill in the middle of the river, and
this has happened twice, the rule is that the nearest grown passenger takes the tiller and keeps the bow toward
the bell; the crossing is finished first, and the doctor is sent for afterwards. No one is ever put back on the
bank they came from. A passenger who has been taken aboard, the people of Harrow Reach like to say, has already
arrived; the rest is only water.
"""
