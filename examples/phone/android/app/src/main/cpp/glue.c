/* What RetNet.java calls: a model and one sequence, behind a number. Texts come and go as bytes of UTF-8, since the
strings of JNI are a UTF-8 of its own. */

#include <jni.h>
#include <retentive.h>
#include <stdlib.h>
#include <string.h>

#define CALL(type, name) JNIEXPORT type JNICALL Java_org_retentive_phone_RetNet_##name

typedef struct {
    Retentive *model;
    RetentiveStates *states;
    float *logits;
    uint64_t random;
} Session;

static Session *session_of(jlong number) { return (Session *)(intptr_t)number; }

static void stop(JNIEnv *env, const char *kind, const char *why) {
    jclass type = (*env)->FindClass(env, kind);
    if (type) (*env)->ThrowNew(env, type, why);
}
static const char *const IO = "java/io/IOException", *const MEMORY = "java/lang/OutOfMemoryError";

/* the bytes and a 0 after them; NULL, and something is thrown */
static char *copy_of(JNIEnv *env, jbyteArray bytes) {
    jsize length = (*env)->GetArrayLength(env, bytes);
    char *copy = malloc((size_t)length + 1);
    if (!copy) return stop(env, MEMORY, "no memory for a text"), NULL;
    (*env)->GetByteArrayRegion(env, bytes, 0, length, (jbyte *)copy);
    copy[length] = 0;
    return copy;
}

static void close_session(Session *s) {
    if (s && s->states) retentive_free(s->states);
    if (s && s->model) retentive_close(s->model);
    if (s) free(s->logits);
    free(s);
}

CALL(jlong, open)(JNIEnv *env, jclass type, jbyteArray folder, jint threads, jlong seed) {
    char error[256] = "no memory for the model", *path = copy_of(env, folder);
    Session *s = path ? calloc(1, sizeof *s) : NULL;
    if (s) s->model = retentive_open(path, threads, error);
    if (s && s->model) {
        s->random = (uint64_t)seed;
        s->states = retentive_states(s->model, 1);
        s->logits = malloc((size_t)retentive_vocabulary(s->model) * sizeof(float));
        if (!s->states || !s->logits) strcpy(error, "no memory for the state");
    }
    free(path);
    if (s && s->states && s->logits) return (jlong)(intptr_t)s;
    close_session(s);
    if (path) stop(env, IO, error);
    return 0;
}

CALL(void, close)(JNIEnv *env, jclass type, jlong number) { close_session(session_of(number)); }
CALL(jlong, end)(JNIEnv *env, jclass type, jlong number) { return retentive_end(session_of(number)->model); }
CALL(jlong, position)(JNIEnv *env, jclass type, jlong number) { return retentive_position(session_of(number)->states, 0); }
CALL(jlong, bytes)(JNIEnv *env, jclass type, jlong number) { return retentive_bytes(session_of(number)->states); }

CALL(jlongArray, encode)(JNIEnv *env, jclass type, jlong number, jbyteArray bytes) {
    jsize length = (*env)->GetArrayLength(env, bytes);
    char *text = copy_of(env, bytes);
    int64_t *ids = text ? malloc(((size_t)length + 1) * sizeof *ids) : NULL;
    int64_t count = ids ? retentive_encode(session_of(number)->model, text, length, ids) : 0;
    jlongArray made = NULL;
    if (text && !ids) stop(env, MEMORY, "no memory for a text");
    else if (count < 0) stop(env, IO, "this model's tokenizer.json is missing, or none that is known here");
    else if (ids && (made = (*env)->NewLongArray(env, (jsize)count)))
        (*env)->SetLongArrayRegion(env, made, 0, (jsize)count, (const jlong *)ids);
    free(text), free(ids);
    return made;
}

CALL(jbyteArray, text)(JNIEnv *env, jclass type, jlong number, jlong id) {
    int64_t length;
    const char *bytes = retentive_text(session_of(number)->model, id, &length);
    jbyteArray made = (*env)->NewByteArray(env, (jsize)length);
    if (made) (*env)->SetByteArrayRegion(env, made, 0, (jsize)length, (const jbyte *)bytes);
    return made;
}

CALL(void, read)(JNIEnv *env, jclass type, jlong number, jlongArray ids) {
    Session *s = session_of(number);
    jsize count = (*env)->GetArrayLength(env, ids);
    jlong *given = (*env)->GetLongArrayElements(env, ids, NULL);
    int good = given && retentive_read(s->states, 0, (const int64_t *)given, count, s->logits);
    if (given) (*env)->ReleaseLongArrayElements(env, ids, given, JNI_ABORT);
    if (!good) stop(env, IO, "the text could not be read: no tokens, unknown ones, or no memory");
}

/* a token after all that was read */
CALL(jlong, sample)(JNIEnv *env, jclass type, jlong number, jdouble temperature, jdouble top_p) {
    Session *s = session_of(number);
    RetentiveSampling how = {.temperature = temperature, .top_p = top_p};
    int64_t id = retentive_sample(s->logits, retentive_vocabulary(s->model), &how, &s->random);
    if (id < 0) stop(env, IO, "the model's logits are not finite");
    return id;
}

static void keep(JNIEnv *env, jlong number, jbyteArray file, int (*how)(RetentiveStates *, int64_t, const char *, char *)) {
    char error[256], *path = copy_of(env, file);
    if (path && !how(session_of(number)->states, 0, path, error)) stop(env, IO, error);
    free(path);
}

CALL(void, save)(JNIEnv *env, jclass type, jlong number, jbyteArray file) { keep(env, number, file, retentive_save); }
CALL(void, load)(JNIEnv *env, jclass type, jlong number, jbyteArray file) { keep(env, number, file, retentive_load); }

CALL(void, forget)(JNIEnv *env, jclass type, jlong number) {
    Session *s = session_of(number);
    RetentiveStates *fresh = retentive_states(s->model, 1);
    if (!fresh) return stop(env, MEMORY, "no memory for the state");
    retentive_free(s->states), s->states = fresh;
}
