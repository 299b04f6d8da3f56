"""Sentences, paragraphs and questions made from the phrase tables, always as an (English, Chinese) pair.

A sentence or a question that can be new (one with a choice of words in it) is either held out, in whatever form it
comes, or in training: which of the two, its words decide (`is_held_out`). Held-out ones are new combinations of words
that training has.
"""

import random
import zlib

SLOTS = {
    "day": [
        ("Monday", "星期一"),
        ("Tuesday", "星期二"),
        ("Wednesday", "星期三"),
        ("Thursday", "星期四"),
        ("Friday", "星期五"),
        ("Saturday", "星期六"),
        ("Sunday", "星期天"),
    ],
    "place": [
        ("the lake", "湖边"),
        ("the old tower", "古塔"),
        ("the garden", "花园"),
        ("the market", "市场"),
        ("the library", "图书馆"),
        ("the station", "车站"),
        ("the school", "学校"),
        ("the hill", "山上"),
    ],
    "friend": [("my sister", "姐姐"), ("my brother", "弟弟"), ("my mother", "妈妈"), ("my teacher", "老师")],
    "weather": [("sunny", "晴朗"), ("windy", "多风"), ("cold", "很冷"), ("warm", "暖和"), ("rainy", "阴雨")],
    "color": [
        ("red", "红色"),
        ("orange", "橙色"),
        ("yellow", "黄色"),
        ("green", "绿色"),
        ("blue", "蓝色"),
        ("white", "白色"),
        ("black", "黑色"),
    ],
    "fruit": [("apples", "苹果"), ("pears", "梨"), ("oranges", "橙子"), ("peaches", "桃子"), ("plums", "李子")],
    "drink": [("green tea", "绿茶"), ("warm milk", "热牛奶"), ("cold water", "凉水"), ("orange juice", "橙汁")],
    "animal": [("a duck", "一只鸭子"), ("a cat", "一只猫"), ("a small bird", "一只小鸟"), ("a dog", "一只狗")],
    "boat": [("a small boat", "一条小船"), ("a long boat", "一条长船"), ("a white boat", "一条白船")],
    "time": [
        ("in the morning", "早上"),
        ("at noon", "中午"),
        ("in the afternoon", "下午"),
        ("in the evening", "晚上"),
    ],
    "count": [
        ("two", "两"),
        ("three", "三"),
        ("four", "四"),
        ("five", "五"),
        ("six", "六"),
        ("seven", "七"),
        ("eight", "八"),
        ("nine", "九"),
    ],
    "season": [("spring", "春天"), ("summer", "夏天"), ("autumn", "秋天"), ("winter", "冬天")],
    "tool": [("a pencil", "一支铅笔"), ("a camera", "一台相机"), ("an umbrella", "一把雨伞"), ("a map", "一张地图")],
    "mood": [("happy", "高兴"), ("tired", "累"), ("hungry", "饿"), ("curious", "好奇")],
}

TOPICS = {
    "walk": [
        ("On {day} I walked to {place} with {friend}.", "{day}我和{friend}一起走到{place}。"),
        ("The weather was {weather} {time}.", "{time}天气{weather}。"),
        ("We saw {animal} near the water.", "我们在水边看到{animal}。"),
        ("We took {tool} with us.", "我们带了{tool}。"),
        ("At {place} we rested for {count} minutes.", "我们在{place}休息了{count}分钟。"),
        ("Then we drank {drink}.", "然后我们喝了{drink}。"),
        ("{Friend} was {mood} all day.", "{friend}一整天都很{mood}。"),
        ("We came home {time}.", "我们{time}回到家。"),
    ],
    "tower": [
        ("The tower stands beside a wide lake.", "楼阁立在宽阔的湖边。"),
        ("Its roof is covered with {color} tiles.", "屋顶铺着{color}的瓦片。"),
        ("There are {count} windows on each side.", "每一面有{count}扇窗户。"),
        ("In {season} many people climb the stairs.", "{season}有很多人爬上楼梯。"),
        ("From the top we can see {boat}.", "从楼顶可以看到{boat}。"),
        ("The pillars are painted {color} and {color2}.", "柱子漆成{color}和{color2}。"),
        ("Old trees grow around the wall.", "墙边长着古老的树。"),
        ("{Time} the light on the roof is soft.", "{time}屋顶上的光很柔和。"),
    ],
    "garden": [
        ("{Count} {color} flowers opened in the garden.", "花园里开了{count}朵{color}的花。"),
        ("The petals lie close together in rings.", "花瓣一圈一圈地靠在一起。"),
        ("{Friend} waters the plants {time}.", "{friend}{time}给植物浇水。"),
        ("In {season} the leaves turn {color}.", "{season}叶子变成{color}。"),
        ("{Animal} sleeps under the bench.", "{animal}在长椅下睡觉。"),
        ("A bud will open in {count} days.", "花苞再过{count}天就会开。"),
        ("The garden is quiet on {day}.", "{day}花园里很安静。"),
        ("I have {tool} in my bag and look at the flowers.", "我包里有{tool}，我看着花。"),
    ],
    "market": [
        ("The market opens {time}.", "市场{time}开门。"),
        ("I bought {count} {fruit} and {count2} {fruit2}.", "我买了{count}个{fruit}和{count2}个{fruit2}。"),
        ("The {fruit} are fresh and sweet.", "{fruit}又新鲜又甜。"),
        ("{Friend} paid {count} coins for {drink}.", "{friend}花{count}块钱买了{drink}。"),
        ("A man sells {color} cloth next to the door.", "有人在门边卖{color}的布。"),
        ("On {day} everything is cheaper.", "{day}东西都更便宜。"),
        ("I was {mood}, so I sat down.", "我很{mood}，就坐了下来。"),
        ("The way from {place} is not long.", "从{place}过来的路不远。"),
    ],
    "lake": [
        ("{Boat} crosses the lake {time}.", "{time}{boat}划过湖面。"),
        ("The water looks {color} in {season}.", "{season}湖水看起来是{color}的。"),
        ("{Animal} waits on the bridge.", "{animal}在桥上等着。"),
        ("We counted {count} boats far away.", "我们数到远处有{count}条船。"),
        ("It was {weather} and the water was still.", "天气{weather}，水面很平静。"),
        ("{Friend} told me a story about the lake.", "{friend}给我讲了湖的故事。"),
        ("The island in the middle is full of trees.", "湖中间的小岛上都是树。"),
        ("We will come back on {day}.", "我们{day}再来。"),
    ],
    "film": [
        ("{Friend} films the tower {time}.", "{friend}{time}拍摄楼阁。"),
        ("The camera turns slowly to the {color} roof.", "镜头慢慢转向{color}的屋顶。"),
        ("After {count} seconds the picture changes.", "{count}秒以后画面变了。"),
        ("A voice says what we see.", "有声音说出我们看到的东西。"),
        ("The sound is clear and the light is good.", "声音清楚，光线也好。"),
        ("On {day} we watch the film together.", "{day}我们一起看这部短片。"),
        ("The last picture shows {animal}.", "最后一个画面是{animal}。"),
        ("We need {tool} for the next film.", "下一部短片需要{tool}。"),
    ],
}

NUMBERS = [
    ("one", "一"),
    ("two", "二"),
    ("three", "三"),
    ("four", "四"),
    ("five", "五"),
    ("six", "六"),
    ("seven", "七"),
    ("eight", "八"),
    ("nine", "九"),
    ("ten", "十"),
    ("eleven", "十一"),
    ("twelve", "十二"),
    ("thirteen", "十三"),
    ("fourteen", "十四"),
    ("fifteen", "十五"),
    ("sixteen", "十六"),
    ("seventeen", "十七"),
    ("eighteen", "十八"),
]

OPPOSITES = [
    (("big", "大"), ("small", "小")),
    (("hot", "热"), ("cold", "冷")),
    (("long", "长"), ("short", "短")),
    (("fast", "快"), ("slow", "慢")),
    (("high", "高"), ("low", "低")),
    (("old", "旧"), ("new", "新")),
    (("bright", "亮"), ("dark", "暗")),
]

FACTS = [
    (("What colour is the sky on a clear day?", "The sky is blue."), ("晴天的天空是什么颜色？", "天空是蓝色的。")),
    (("What colour is snow in the winter?", "Snow is white."), ("冬天的雪是什么颜色？", "雪是白色的。")),
    (("What colour are leaves in the summer?", "The leaves are green."), ("夏天的叶子是什么颜色？", "叶子是绿色的。")),
    (("How many days are there in a week?", "There are seven days."), ("一个星期有几天？", "一个星期有七天。")),
    (("How many months are there in a year?", "There are twelve months."), ("一年有几个月？", "一年有十二个月。")),
    (("Which animal says meow?", "The cat says meow."), ("哪种动物会喵喵叫？", "猫会喵喵叫。")),
    (("Which animal guards the house?", "The dog guards the house."), ("哪种动物会看家？", "狗会看家。")),
    (("Where do fish live?", "Fish live in the water."), ("鱼生活在哪里？", "鱼生活在水里。")),
    (("What do we use to take a photo?", "We use a camera."), ("我们用什么拍照？", "我们用相机。")),
    (("Where does the sun rise?", "The sun rises in the east."), ("太阳从哪边升起？", "太阳从东边升起。")),
]


Pair = tuple[str, str]
"""The same text in English and in Chinese."""


def is_held_out(english: str) -> bool:
    """Whether no training document may hold this sentence: one in eight, decided by its words."""
    return zlib.crc32(english.lower().encode()) % 8 == 0


def _fill_of_split(rng: random.Random, template: Pair, held_out: bool) -> Pair | None:
    """Fills a template until its sentence is of the split; None for one of training alone, which has no slots."""
    if "{" not in template[0]:
        return None if held_out else template
    while True:
        pair = _fill(rng, template)
        if is_held_out(pair[0]) == held_out:
            return pair
        if held_out:
            return None  # of few combinations perhaps none is held out: another template is drawn


def _fill(rng: random.Random, template: Pair) -> Pair:
    """Fills every slot with one value, the same in both languages; `{Friend}` is `{friend}` with a capital letter."""
    # Two different values a slot are drawn whether the template has it or not: a new slot changes later draws alike.
    english, chinese = template
    for name, values in SLOTS.items():
        first, second = rng.sample(values, 2)
        english = english.replace("{" + name + "}", first[0]).replace("{" + name + "2}", second[0])
        english = english.replace("{" + name.capitalize() + "}", first[0][:1].upper() + first[0][1:])
        chinese = chinese.replace("{" + name + "}", first[1]).replace("{" + name + "2}", second[1])
    return english, chinese


def sentence(rng: random.Random, held_out: bool = False) -> Pair:
    """Writes one sentence of any topic, of training or held out: 1.5-5 s when spoken."""
    while True:
        pair = _fill_of_split(rng, rng.choice(TOPICS[rng.choice(list(TOPICS))]), held_out)
        if pair is not None:
            return pair


def sentences(rng: random.Random, count: int) -> list[Pair]:
    """Writes `count` different sentences of one topic, in the order of its table, which reads as a small story.

    None of them is held out.
    """
    templates = TOPICS[rng.choice(list(TOPICS))]
    chosen = sorted(rng.sample(range(len(templates)), count))
    return [pair for index in chosen if (pair := _fill_of_split(rng, templates[index], False)) is not None]


def join(texts: list[str], language: str) -> str:
    """Joins sentences as running text: a space between English ones, none between Chinese ones."""
    return (" " if language == "en" else "").join(texts)


def paragraph(rng: random.Random, language: str) -> str:
    """Writes a text document: a story, sums, or questions with answers; 60-400 characters."""
    index = ("en", "zh").index(language)
    kind = rng.choice(["story", "story", "story", "sums", "questions"])
    if kind == "story":
        pairs = sentences(rng, rng.randrange(5, 8)) + sentences(rng, rng.randrange(2, 5))
        return join([pair[index] for pair in pairs], language)
    if kind == "sums":
        return join([_sum(rng)[index] for _ in range(rng.randrange(5, 9))], language)
    dialogues = [dialogue(rng)[index] for _ in range(rng.randrange(3, 6))]
    asks, answers = ("Question: ", "Answer: ") if language == "en" else ("问：", "答：")
    return "\n".join(f"{asks}{question}\n{answers}{answer}" for question, answer in dialogues)


def _sum(rng: random.Random) -> Pair:
    return _sum_of_split(rng, False)[2]


def _sum_of_split(rng: random.Random, held_out: bool) -> tuple[Pair, Pair, Pair]:
    """Draws two numbers whose sum is of the split; returns their words and the sentence that adds them."""
    while True:
        a, b = rng.randrange(1, 10), rng.randrange(1, 10)
        x, y, total = NUMBERS[a - 1], NUMBERS[b - 1], NUMBERS[a + b - 1]
        added = f"{x[0].capitalize()} plus {y[0]} is {total[0]}."
        if is_held_out(added) == held_out:
            return x, y, (added, f"{x[1]}加{y[1]}等于{total[1]}。")


def dialogue(rng: random.Random, held_out: bool = False) -> tuple[Pair, Pair]:
    """Writes ((English question, its answer), (Chinese question, its answer)); the answer is true and short.

    Held out are sums and opposites, which follow from others; a day's name or a fact is known or not.
    """
    kind = rng.choice(["sum", "sum", "sum", "opposite"] if held_out else ["sum", "day", "opposite", "fact", "fact"])
    if kind == "fact":
        return rng.choice(FACTS)
    if kind == "sum":
        x, y, added = _sum_of_split(rng, held_out)
        return (f"How much is {x[0]} plus {y[0]}?", added[0]), (f"{x[1]}加{y[1]}等于多少？", added[1])
    if kind == "day":
        index = rng.randrange(7)
        today, after = SLOTS["day"][index], SLOTS["day"][(index + 1) % 7]
        english = (f"Which day comes after {today[0]}?", f"After {today[0]} comes {after[0]}.")
        return english, (f"{today[1]}的后一天是星期几？", f"{today[1]}的后一天是{after[1]}。")
    while True:
        words = list(rng.choice(OPPOSITES))
        rng.shuffle(words)
        word, other = words
        if is_held_out(f"{word[0]} and {other[0]}") == held_out:
            break
    english = (f"What is the opposite of {word[0]}?", f"The opposite of {word[0]} is {other[0]}.")
    return english, (f"{word[1]}的反义词是什么？", f"{word[1]}的反义词是{other[1]}。")
