/* A host without any library: reads V_a of one layer from a preset file by itself.
 *
 *     cc preset.c -lm -o preset
 *     ./preset preset.safetensors mid_block.attentions.0.transformer_blocks.0.attn2
 *
 * docs/c-api.md has the format in a page, docs/format.md all of it. A real host reads its other
 * weights from safetensors files already, and needs none of this but the name of the tensor. */
#include <inttypes.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void fail(const char *what) {
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* The text after `"key":` in a JSON object, past spaces. Tensor entries hold no nested objects, so
 * the first `}` ends them. */
static const char *member(const char *object, const char *end, const char *key) {
    char quoted[512];
    int length = snprintf(quoted, sizeof quoted, "\"%s\"", key);
    if (length < 0 || (size_t)length >= sizeof quoted)
        fail("name too long");
    for (const char *p = object; p + length < end; ++p) {
        if (memcmp(p, quoted, (size_t)length) != 0)
            continue;
        p += length;
        p += strspn(p, " \t\n\r");
        if (*p != ':')
            continue; /* a value, not a key */
        ++p;
        return p + strspn(p, " \t\n\r");
    }
    fail(key);
    return NULL;
}

static float half_to_float(uint16_t h) {
    const int exponent = h >> 10 & 31, mantissa = h & 1023;
    const float value = exponent == 0 ? ldexpf((float)mantissa, -24)
                                      : ldexpf((float)(mantissa + 1024), exponent - 25);
    return h >> 15 ? -value : value; /* presets are finite */
}

int main(int argc, char **argv) {
    if (argc != 3)
        fail("usage: preset FILE LAYER");
    FILE *file = fopen(argv[1], "rb");
    unsigned char size_bytes[8];
    if (file == NULL || fread(size_bytes, 1, 8, file) != 8)
        fail("cannot read the file");
    uint64_t header_size = 0;
    for (int i = 7; i >= 0; --i)
        header_size = header_size << 8 | size_bytes[i];
    if (header_size > 100 * 1000 * 1000)
        fail("header too long");
    char *header = malloc((size_t)header_size + 1);
    if (header == NULL || fread(header, 1, (size_t)header_size, file) != header_size)
        fail("the header is cut off");
    header[header_size] = '\0';
    const char *end = header + header_size;
    if (strncmp(member(header, end, "vmix.format"), "\"2\"", 3) != 0 ||
        strncmp(member(header, end, "vmix.kind"), "\"preset\"", 8) != 0)
        fail("not a preset of format 2");

    char name[256];
    snprintf(name, sizeof name, "%s.v_aes", argv[2]);
    const char *tensor = member(header, end, name);
    const char *tensor_end = strchr(tensor, '}');
    if (*tensor != '{' || tensor_end == NULL)
        fail("not a tensor");
    uint64_t start = 0, stop = 0, tokens = 0, width = 0;
    char dtype[8] = "";
    if (sscanf(member(tensor, tensor_end, "data_offsets"), "[ %" SCNu64 " , %" SCNu64, &start,
               &stop) != 2 ||
        sscanf(member(tensor, tensor_end, "shape"), "[ %" SCNu64 " , %" SCNu64, &tokens, &width) != 2 ||
        sscanf(member(tensor, tensor_end, "dtype"), "\"%7[A-Z0-9]", dtype) != 1)
        fail("a tensor that lacks something");
    const uint64_t size = strcmp(dtype, "F32") == 0 ? 4 : 2;
    if (tokens > 4096 || width > 1 << 20 || stop < start || stop - start != tokens * width * size)
        fail("a tensor that lies about its size");

    unsigned char *data = malloc((size_t)(stop - start) + 1);
    if (data == NULL || fseek(file, (long)(8 + header_size + start), SEEK_SET) != 0 ||
        fread(data, 1, (size_t)(stop - start), file) != stop - start)
        fail("the file is cut off");
    double sum = 0;
    for (uint64_t i = 0; i < tokens * width; ++i) {
        uint32_t bits = 0;
        for (uint64_t byte = size; byte-- > 0;)
            bits = bits << 8 | data[i * size + byte];
        float x;
        if (strcmp(dtype, "F16") == 0) {
            x = half_to_float((uint16_t)bits);
        } else {
            bits = size == 2 ? bits << 16 : bits; /* BF16 is the upper half of F32 */
            memcpy(&x, &bits, sizeof x);
        }
        sum += (double)x * x; /* a host does v[t][i] += lambda * x for every token t mod tokens */
    }
    printf("%s [%" PRIu64 ", %" PRIu64 "] %s, |V_a| %.4f\n", argv[2], tokens, width, dtype, sqrt(sum));
    free(data);
    free(header);
    fclose(file);
    return 0;
}
