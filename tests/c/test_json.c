/* test_json.c - JSON text to nodes: values, lines, what is accepted beyond the standard, and what
 * each kind of bad text is told. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/ds.h"

static int parse(ds_json *doc, const char *text)
{
    return ds_json_parse(doc, text, (int64_t)strlen(text), "x.json");
}

static void assert_refused(const char *text, size_t bytes, const char *message)
{
    ds_json doc;

    assert_true(ds_json_parse(&doc, text, (int64_t)bytes, "x.json") < 0);
    if (!strstr(ds_error(), message))
        fail_msg("expected \"%s\", got \"%s\"", message, ds_error());
    assert_null(doc.nodes);
    ds_json_free(&doc); /* nothing to free, and harmless */
}

static void values_and_lines(void **state)
{
    static const char text[] = "// settings\n"
                               "{ \"a\": 1, # one\n"
                               "  \"b\" :\n"
                               "   [true, -2.5e1, {\"c\": null},], /* gone\n"
                               "   */ \"d\": \"x\\\"//y\\u00e9\\u0000z\", \"e\": {},\n"
                               "}\n";
    ds_json doc;
    (void)state;

    assert_int_equal(parse(&doc, text), 0);
    assert_int_equal(doc.n, 9);
    const ds_json_node *n = doc.nodes;
    assert_int_equal(n[0].type, DS_JSON_OBJECT);
    assert_int_equal(n[0].size, 4);
    assert_int_equal(n[0].line, 2);
    assert_null(n[0].key);
    assert_string_equal(n[1].key, "a");
    assert_true(n[1].type == DS_JSON_NUMBER && n[1].number == 1);
    assert_string_equal(n[2].key, "b");
    assert_int_equal(n[2].key_line, 3);
    assert_int_equal(n[2].line, 4);
    assert_int_equal(n[2].size, 3);
    assert_true(n[3].type == DS_JSON_TRUE && !n[3].key);
    assert_true(n[4].number == -25);
    assert_int_equal(n[5].type, DS_JSON_OBJECT);
    assert_int_equal(n[6].type, DS_JSON_NULL);
    assert_string_equal(n[7].key, "d");
    assert_int_equal(n[7].line, 5);
    assert_int_equal(n[7].size, 9);
    assert_memory_equal(n[7].text, "x\"//y\xc3\xa9\0z", 9);
    ds_json_free(&doc);
    ds_json_free(&doc);
    assert_null(doc.nodes);
}

static void plain_values_stand_alone(void **state)
{
    static const struct {
        const char *text;
        int type;
    } cases[] = {
        {"null", DS_JSON_NULL},
        {" 3 // three", DS_JSON_NUMBER},
        {"\"s\"", DS_JSON_STRING},
        {"[]", DS_JSON_ARRAY},
        {"\xef\xbb\xbf{}", DS_JSON_OBJECT},
        {"false\n", DS_JSON_FALSE},
        {"[1,/*x*/]", DS_JSON_ARRAY},
    };
    ds_json doc;
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        if (parse(&doc, cases[i].text) < 0)
            fail_msg("%s: %s", cases[i].text, ds_error());
        assert_int_equal(doc.nodes[0].type, cases[i].type);
        ds_json_free(&doc);
    }
}

static void integers_are_exact_or_refused(void **state)
{
    ds_json doc;
    (void)state;

    assert_int_equal(parse(&doc, "[9007199254740992, -9007199254740992, 1152921504606846976]"), 0);
    assert_true(doc.nodes[1].number == 9007199254740992.0);
    assert_true(doc.nodes[2].number == -9007199254740992.0);
    assert_true(doc.nodes[3].number == 1152921504606846976.0); /* 2^60 */
    ds_json_free(&doc);
    assert_int_equal(parse(&doc, "-0.0"), 0);
    assert_true(1 / doc.nodes[0].number < 0);
    ds_json_free(&doc);
    assert_refused("\n9007199254740993", 17, "x.json:2: integer 9007199254740993 can't be held");
    assert_refused("9223372036854775807", 19, "x.json:1: integer 9223372036854775807");
    assert_refused("92233720368547758070", 20, "x.json:1: too big integer");
    assert_refused("1e999", 5, "x.json:1: real number overflow");
}

static void bad_text_is_refused_with_its_line(void **state)
{
    static const struct {
        const char *text, *message;
    } cases[] = {
        {" \n# only\n", "x.json:3: nothing here but white space and comments"},
        {"{\"a\": 1,\n\"b\": 2,\n\"a\": 3}", "x.json:3: duplicate key \"a\""},
        {"[{\"x\\u0041\": 1,\n\"xA\": 3}]", "x.json:2: duplicate key"},
        {"[1,,]", "x.json:1: unexpected token near ','"},
        {"[,]", "x.json:1: unexpected token"},
        {"{,}", "x.json:1: "},
        {"{\"a\":,}", "x.json:1: unexpected token"},
        {"[1\n", "x.json:2: ']' expected near end of file"},
        {"3,", "x.json:1: end of file expected near ','"},
        {"\n[1 / 2]", "x.json:2: ']' expected near '/'"},
        {"\n\n[ /* x\n\n", "x.json:3: comment without an end"},
        {"/*/", "x.json:1: comment without an end"},
        {"[\"a\nb\"]", "x.json:1: unexpected newline"},
        {"[\"\xff\"]", "x.json:1: unable to decode byte 0xff"},
        {"[\"\\ud800\"]", "x.json:1: invalid Unicode"},
        {"{\"a\\u0000\": 1}", "x.json:1: NUL byte in object key"},
        {"[01]", "x.json:1: invalid token"},
        {"{a: 1}", "x.json:1: string or '}' expected"},
        {"nope", "x.json:1: invalid token near 'nope'"},
        {"[NaN]", "x.json:1: invalid token"},
        {"\"", "x.json:1: "},
        {"\"\\", "x.json:1: "},
        {"]", "x.json:1: "},
        {"[1]]", "x.json:1: end of file expected"},
    };
    (void)state;

    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        assert_refused(cases[i].text, strlen(cases[i].text), cases[i].message);
    assert_refused("", 0, "x.json:1: the file is empty");
    assert_refused("[1,\n\0]", 6, "x.json:2: NUL byte at offset 4");
}

static void nesting_has_a_limit(void **state)
{
    char text[2 * (DS_JSON_DEPTH + 1)];
    ds_json doc;
    (void)state;

    for (int depth = DS_JSON_DEPTH; depth <= DS_JSON_DEPTH + 1; depth++) {
        memset(text, '[', (size_t)depth);
        memset(text + depth, ']', (size_t)depth);
        if (depth == DS_JSON_DEPTH) {
            assert_int_equal(ds_json_parse(&doc, text, 2 * depth, "x.json"), 0);
            assert_int_equal(doc.n, depth);
            ds_json_free(&doc);
        } else {
            assert_refused(text, 2 * (size_t)depth,
                           "x.json:1: arrays and objects are nested deeper");
        }
    }
    memset(text, '[', sizeof text); /* no end either */
    assert_refused(text, sizeof text, "nested deeper than 256 levels");
}

/* Many keys: the order of the nodes is that of the text, whatever jansson's hash table does. */
static void order_is_that_of_the_text(void **state)
{
    enum { N = 2000 };
    char *text = malloc(N * 32), *p = text;
    ds_json doc;
    (void)state;

    assert_non_null(text);
    p += sprintf(p, "{");
    for (int i = 0; i < N; i++)
        p += sprintf(p, "\n\"k%d\": %d,", (i * 7919) % N, i);
    p += sprintf(p, "}");
    assert_int_equal(ds_json_parse(&doc, text, p - text, "x.json"), 0);
    assert_int_equal(doc.n, N + 1);
    for (int i = 0; i < N; i++) {
        assert_true(doc.nodes[i + 1].number == i);
        assert_int_equal(doc.nodes[i + 1].line, i + 2);
        assert_int_equal(doc.nodes[i + 1].key_line, i + 2);
    }
    ds_json_free(&doc);
    free(text);
}

static void utf8_is_told_from_bytes(void **state)
{
    (void)state;
    assert_int_equal(ds_json_utf8("", 0), 1);
    assert_int_equal(ds_json_utf8("gr\xc3\xbc\xc3\x9f", 6), 1);
    assert_int_equal(ds_json_utf8("a\0b", 3), 1);
    assert_int_equal(ds_json_utf8("\xc3", 1), 0);
    assert_int_equal(ds_json_utf8("\xed\xa0\x80", 3), 0); /* a surrogate */
    assert_int_equal(ds_json_utf8("\xc0\x80", 2), 0);     /* overlong */
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(values_and_lines),
        cmocka_unit_test(plain_values_stand_alone),
        cmocka_unit_test(integers_are_exact_or_refused),
        cmocka_unit_test(bad_text_is_refused_with_its_line),
        cmocka_unit_test(nesting_has_a_limit),
        cmocka_unit_test(order_is_that_of_the_text),
        cmocka_unit_test(utf8_is_told_from_bytes),
    };
    return cmocka_run_group_tests_name("json", tests, NULL, NULL);
}
