/* What the tests ask of the splitting of words: `words runs DIGITS`, `words ends DIGITS < TEXT`, `words points < TEXT`.

The first code point and the class of every run of one class; the bytes up to each end of a word; each code point. DIGITS
is 1 where each digit is a word of its own.
*/

#include <text.h>

int main(int argc, char **argv) {
    static char text[1 << 24];
    Text t = {.digits = argc > 2 && *argv[2] == '1'};
    if (argc < 2) return 1;
    if (!strcmp(argv[1], "runs")) {
        for (uint32_t c = 0; c < 0x110000; c++)
            if (!c || class_of(&t, c) != class_of(&t, c - 1)) printf("%u %u\n", c, class_of(&t, c));
        return 0;
    }
    const char *at = text, *end = text + fread(text, 1, sizeof text, stdin);
    while (at < end) {
        if (!strcmp(argv[1], "ends")) at = word_end(&t, at, end), printf("%td\n", at - text);
        else printf("%u\n", code_point(&at, end));
    }
    return 0;
}
