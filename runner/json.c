/* json.c - JSON text to a flat array of nodes, through jansson.
 *
 * jansson is strict and rejects duplicate keys, but it has no comments and forgets where a value
 * stood. Both are added around it:
 *  - blank() overwrites comments and trailing commas with spaces in a copy of the text before
 *    jansson sees it; line ends stay, so positions stay right;
 *  - flatten() walks jansson's tree, which keeps the order of the text, in step with a scan of that
 *    text. The text is known to be valid by then and holds exactly one token for each key and each
 *    value, in the same order, so the scan only has to find where the next token begins.
 *
 * Accepted beyond RFC 8259: comments (from two slashes or # to the end of the line, and between
 * slash-star and star-slash), one comma before ] or }, a UTF-8 byte order mark. Refused although
 * RFC 8259 leaves it open: duplicate keys, integers that a double can't hold, NUL in a key, more
 * than DS_JSON_DEPTH levels. Comments need not be UTF-8; everything else must.
 */
#include "runner/ds.h"

#include <jansson.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"

/* ---- comments and trailing commas become spaces */

struct blanker {
    const char *name;
    char *p, *end;
    int line;
    int depth;
    char last;   /* the last character that counts: not white space, not comment */
    char before; /* the one before it */
    char *comma; /* where the last comma stood */
};

static int fail_at(const char *name, int line, const char *what)
{
    return ds_fail(DS_ECORRUPT, "%s:%d: %s", name, line, what);
}

static void count(struct blanker *b, char c)
{
    b->before = b->last;
    b->last = c;
}

static void blank_line_comment(struct blanker *b)
{
    while (b->p < b->end && *b->p != '\n')
        *b->p++ = ' ';
}

static int blank_block_comment(struct blanker *b)
{
    int first = b->line;

    *b->p++ = ' ';
    *b->p++ = ' ';
    for (; b->end - b->p >= 2; b->p++) {
        if (b->p[0] == '*' && b->p[1] == '/') {
            *b->p++ = ' ';
            *b->p++ = ' ';
            return 0;
        }
        if (*b->p == '\n')
            b->line++;
        else
            *b->p = ' ';
    }
    return fail_at(b->name, first, "comment without an end ('*/' is missing)");
}

/* Leaves p behind the closing quote; a string cut off by the line's end is jansson's to report. */
static void skip_string(struct blanker *b)
{
    count(b, '"');
    for (b->p++; b->p < b->end && *b->p != '\n'; b->p++) {
        if (*b->p == '\\' && b->end - b->p >= 2 && b->p[1] != '\n') {
            b->p++;
        } else if (*b->p == '"') {
            b->p++;
            return;
        }
    }
}

/* A comma right after a value and right before ] or } goes; `[,]` and `[1,,]` stay errors. */
static void drop_trailing_comma(struct blanker *b)
{
    if (b->last == ',' && b->before && !strchr("[{,:", b->before))
        *b->comma = ' ';
}

static int blank(struct blanker *b)
{
    while (b->p < b->end) {
        char c = *b->p;
        int slash = c == '/' && b->end - b->p >= 2;

        if (c == '#' || (slash && b->p[1] == '/')) {
            blank_line_comment(b);
            continue;
        }
        if (slash && b->p[1] == '*') {
            int rc = blank_block_comment(b);
            if (rc < 0)
                return rc;
            continue;
        }
        if (c == '"') {
            skip_string(b);
            continue;
        }
        if (c == '\n')
            b->line++;
        if ((c == '[' || c == '{') && ++b->depth > DS_JSON_DEPTH)
            return ds_fail(DS_ECORRUPT,
                           "%s:%d: arrays and objects are nested deeper than %d levels", b->name,
                           b->line, DS_JSON_DEPTH);
        if (c == ']' || c == '}') {
            b->depth--;
            drop_trailing_comma(b);
        }
        if (c == ',')
            b->comma = b->p;
        if (!strchr(" \t\r\n", c))
            count(b, c);
        b->p++;
    }
    if (!b->last)
        return fail_at(b->name, b->line, "nothing here but white space and comments");
    return 0;
}

/* ---- the tree to nodes, each with its line */

struct flattener {
    const char *name;
    const char *p, *end;
    int line;
    ds_json_node *node; /* the next to fill */
};

/* Moves to the next token that is a key or a value. */
static void seek_token(struct flattener *f)
{
    for (; f->p < f->end && strchr(" \t\r\n,:]}", *f->p); f->p++)
        if (*f->p == '\n')
            f->line++;
}

static void pass_token(struct flattener *f)
{
    if (f->p == f->end)
        return;
    if (*f->p == '{' || *f->p == '[') {
        f->p++;
    } else if (*f->p == '"') {
        for (f->p++; f->p < f->end && *f->p != '"'; f->p++)
            f->p += *f->p == '\\' && f->end - f->p >= 2;
        f->p += f->p < f->end;
    } else {
        while (f->p < f->end && !strchr(" \t\r\n,:]}", *f->p))
            f->p++;
    }
}

static int next_token(struct flattener *f)
{
    seek_token(f);
    pass_token(f);
    return f->line;
}

static int64_t count_nodes(const json_t *value)
{
    int64_t n = 1;

    if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++)
            n += count_nodes(json_array_get(value, i));
    } else if (json_is_object(value)) {
        json_t *object = (json_t *)value; /* jansson's iterators want it writable */
        for (void *at = json_object_iter(object); at; at = json_object_iter_next(object, at))
            n += count_nodes(json_object_iter_value(at));
    }
    return n;
}

static int integer_node(const struct flattener *f, ds_json_node *node, json_int_t value)
{
    node->type = DS_JSON_NUMBER;
    node->number = (double)value;
    /* 2^63 rounded up is the one double here that does not convert back */
    if (node->number < 9223372036854775808.0 && (json_int_t)node->number == value)
        return 0;
    return ds_fail(
        DS_ECORRUPT,
        "%s:%d: integer %lld can't be held exactly (integers are exact up to 2^53); write "
        "it as a real number or as a string",
        f->name, node->line, (long long)value);
}

static int flatten(struct flattener *f, json_t *value, const char *key, int key_line)
{
    ds_json_node *node = f->node++;
    int rc = 0;

    node->key = key;
    node->line = next_token(f);
    node->key_line = key ? key_line : node->line;
    switch (json_typeof(value)) {
    case JSON_NULL:
        node->type = DS_JSON_NULL;
        break;
    case JSON_FALSE:
        node->type = DS_JSON_FALSE;
        break;
    case JSON_TRUE:
        node->type = DS_JSON_TRUE;
        break;
    case JSON_INTEGER:
        rc = integer_node(f, node, json_integer_value(value));
        break;
    case JSON_REAL:
        node->type = DS_JSON_NUMBER;
        node->number = json_real_value(value);
        break;
    case JSON_STRING:
        node->type = DS_JSON_STRING;
        node->text = json_string_value(value);
        node->size = (int64_t)json_string_length(value);
        break;
    case JSON_ARRAY:
        node->type = DS_JSON_ARRAY;
        node->size = (int64_t)json_array_size(value);
        for (size_t i = 0; i < json_array_size(value) && rc == 0; i++)
            rc = flatten(f, json_array_get(value, i), NULL, 0);
        break;
    case JSON_OBJECT:
        node->type = DS_JSON_OBJECT;
        node->size = (int64_t)json_object_size(value);
        for (void *at = json_object_iter(value); at && rc == 0;
             at = json_object_iter_next(value, at)) {
            int line = next_token(f);
            rc = flatten(f, json_object_iter_value(at), json_object_iter_key(at), line);
        }
        break;
    }
    return rc;
}

/* ---- the public part */

static int parse_error(const char *name, const json_error_t *error)
{
    int line = error->line > 0 ? error->line : 1;
    const char *near = strchr(error->text, '\'');
    int quoted = near ? (int)strlen(near + 1) - 1 : 0; /* without jansson's closing quote */

    switch (json_error_code(error)) {
    case json_error_out_of_memory:
        return ds_fail(DS_ENOMEM, "%s: out of host memory while reading it", name);
    case json_error_duplicate_key:
        return ds_fail(DS_ECORRUPT, "%s:%d: duplicate key %.*s", name, line, quoted,
                       near ? near + 1 : "");
    case json_error_numeric_overflow:
        return ds_fail(DS_ECORRUPT,
                       "%s:%d: %s (integers are exact up to 2^53, real numbers end at 1.8e308)",
                       name, line, error->text);
    default:
        return fail_at(name, line, error->text);
    }
}

static int parse(json_t **root, char *text, size_t bytes, const char *name)
{
    struct blanker b = {.name = name, .p = text, .end = text + bytes, .line = 1};
    const char *nul = memchr(text, 0, bytes);
    json_error_t error;
    int rc;

    if (nul) {
        int line = 1;
        for (const char *p = text; p < nul; p++)
            line += *p == '\n';
        return ds_fail(DS_ECORRUPT, "%s:%d: NUL byte at offset %lld; this is not a text file", name,
                       line, (long long)(nul - text));
    }
    if (bytes >= 3 && memcmp(text, "\xef\xbb\xbf", 3) == 0)
        memset(text, ' ', 3);
    rc = blank(&b);
    if (rc < 0)
        return rc;
    *root =
        json_loadb(text, bytes, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY | JSON_ALLOW_NUL, &error);
    return *root ? 0 : parse_error(name, &error);
}

int ds_json_parse(ds_json *out, const char *text, int64_t bytes, const char *name)
{
    json_t *root = NULL;
    ds_json_node *nodes = NULL;
    char *copy = NULL;
    int64_t n;
    int rc;

    *out = (ds_json){0};
    if (bytes <= 0)
        return fail_at(name, 1, "the file is empty");
    if (bytes > INT_MAX) /* lines are int */
        return ds_fail(DS_EINVAL, "%s: %.1f GiB of JSON is more than the 2 GiB that can be read",
                       name, (double)bytes / (1 << 30));
    copy = malloc((size_t)bytes);
    if (!copy) {
        rc = ds_fail(DS_ENOMEM, "%s: out of host memory", name);
        goto fail;
    }
    memcpy(copy, text, (size_t)bytes);
    rc = parse(&root, copy, (size_t)bytes, name);
    if (rc < 0)
        goto fail;
    n = count_nodes(root);
    nodes = calloc((size_t)n, sizeof *nodes);
    if (!nodes) {
        rc = ds_fail(DS_ENOMEM, "%s: out of host memory", name);
        goto fail;
    }
    struct flattener f = {.name = name, .p = copy, .end = copy + bytes, .line = 1, .node = nodes};
    rc = flatten(&f, root, NULL, 0);
    if (rc < 0)
        goto fail;
    free(copy);
    *out = (ds_json){.n = n, .nodes = nodes, .root = root};
    return 0;

fail:
    json_decref(root);
    free(nodes);
    free(copy);
    return rc;
}

void ds_json_free(ds_json *doc)
{
    json_decref(doc->root);
    free(doc->nodes);
    *doc = (ds_json){0};
}

int ds_json_utf8(const char *text, int64_t bytes)
{
    json_t *string = json_stringn(text, (size_t)bytes); /* jansson checks what it takes */
    int valid = string != NULL;

    json_decref(string);
    return valid;
}
