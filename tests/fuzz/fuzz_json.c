/* fuzz_json.c - any bytes as JSON: no crash, no leak, and what comes out hangs together.
 *
 * Checked of every document: sizes add up to the number of nodes, lines never go back and stay
 * inside the text, keys and strings are UTF-8, nesting keeps its limit.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/error.h"
#include "runner/ds.h"

static void require(int holds)
{
    if (!holds)
        abort();
}

/* The index behind node i and all that is inside it. */
static int64_t walk(const ds_json *doc, int64_t i, int depth, int32_t *line)
{
    const ds_json_node *node = &doc->nodes[i];

    require(i < doc->n && depth <= DS_JSON_DEPTH);
    require(node->key_line >= *line && node->line >= node->key_line);
    *line = node->line;
    if (node->key)
        require(ds_json_utf8(node->key, (int64_t)strlen(node->key)));
    if (node->type == DS_JSON_STRING)
        require(ds_json_utf8(node->text, node->size));
    i++;
    if (node->type == DS_JSON_ARRAY || node->type == DS_JSON_OBJECT) {
        for (int64_t k = 0; k < node->size; k++) {
            require(i < doc->n && !doc->nodes[i].key == (node->type == DS_JSON_ARRAY));
            i = walk(doc, i, depth + 1, line);
        }
    }
    return i;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    ds_json doc;
    int32_t line = 1, lines = 1;

    if (ds_json_parse(&doc, (const char *)data, (int64_t)bytes, "fuzz") < 0) {
        require(doc.nodes == NULL && strncmp(ds_error(), "fuzz:", 5) == 0);
        return 0;
    }
    for (size_t i = 0; i < bytes; i++)
        lines += data[i] == '\n';
    require(walk(&doc, 0, 0, &line) == doc.n && line <= lines);
    ds_json_free(&doc);
    return 0;
}
