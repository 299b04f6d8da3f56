"""Which of the two languages a text is in, by its letters."""

import re

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_LATIN = re.compile(r"[A-Za-z\u00c0-\u024f\uff21-\uff3a\uff41-\uff5a]")
_LETTER = re.compile(r"[^\W\d_]")
_HAN_WEIGHT = 3  # a Chinese character says about as much as three Latin letters


def language_of(text: str) -> str:
    """ "zh" or "en", whichever most of the text is in; "" when half of its letters belong to neither script.

    Text without letters is "en". Latin letters count as English, whatever they spell.

    >>> language_of("\u6211\u7231 JAX"), language_of("\u00c7a va?"), language_of("\u041f\u0440\u0438\u0432\u0435\u0442")
    ('zh', 'en', '')
    """
    han, latin, letters = (len(script.findall(text)) for script in (HAN, _LATIN, _LETTER))
    if 2 * (letters - han - latin) > letters:
        return ""
    return "zh" if _HAN_WEIGHT * han > latin else "en"
